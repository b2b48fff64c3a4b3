"""Load on a server, in an open loop: `python -m bench.load`, settings as JSON on stdin, latencies as JSON on stdout.

Requests are due at random times of a given mean rate (Poisson), drawn beforehand, and each is sent when it is due,
whether or not earlier ones are answered. Latency counts from when it was due, not from when it was sent: what waits
because the server, or this process, is behind is counted as a user would.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import sys
import time
from typing import Any

import aiohttp


async def send(settings: dict[str, Any]) -> dict[str, Any]:
    """Send requests at one rate.

    Args:
        settings: `url`; `bodies`, each with `data` (base64) and `headers`, sent in turn; `rate` per second; `seconds`;
            `seed`; `timeout` in seconds.

    Returns:
        `latency_ms` of the answers with status 200, `failed`, and `late_ms`, by how much this process sent after they
        were due, at p99: the load is what was asked for only where that is small.
    """
    chance = random.Random(settings["seed"])
    due, at = [], 0.0
    while (at := at + chance.expovariate(settings["rate"])) < settings["seconds"]:
        due.append(at)
    bodies = [(base64.b64decode(body["data"]), body["headers"]) for body in settings["bodies"]]
    latency_ms: list[float] = []
    late_ms: list[float] = []
    failed = 0

    async def one(session: aiohttp.ClientSession, place: int, wanted: float) -> None:
        nonlocal failed
        data, headers = bodies[place % len(bodies)]
        late_ms.append((time.perf_counter() - wanted) * 1e3)
        try:
            async with session.post(settings["url"], data=data, headers=headers) as response:
                await response.read()
                is_answered = response.status == 200
        except (aiohttp.ClientError, asyncio.TimeoutError):
            is_answered = False
        if is_answered:
            latency_ms.append((time.perf_counter() - wanted) * 1e3)
        else:
            failed += 1

    timeout = aiohttp.ClientTimeout(total=settings["timeout"])
    # Without a limit of connections: nothing may wait in the client.
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        started = time.perf_counter() + 0.05
        tasks = []
        for place, moment in enumerate(due):
            wanted = started + moment
            pause = wanted - time.perf_counter()
            if pause > 0:
                await asyncio.sleep(pause)
            tasks.append(asyncio.create_task(one(session, place, wanted)))
        await asyncio.gather(*tasks)
    late = sorted(late_ms)[int(0.99 * len(late_ms))] if late_ms else 0.0
    return {"latency_ms": latency_ms, "failed": failed, "late_ms": late}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(send(json.load(sys.stdin)))))
