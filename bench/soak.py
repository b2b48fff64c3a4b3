"""A server that is asked, asked wrongly, and given new artefacts at once: which answers are lost or wrong.

Two artefacts of one model take turns with files that cannot be served. Each good answer names the version it is of; it
is wrong if its scores are not exactly those of that version, and lost if it does not come. Each malformed request must
get a 4xx.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from bench.served import columns
from bench.serving import CANDIDATES, MODELS, K, infer_body, infer_path, server
from lt4rec_sparse import load, save
from lt4rec_sparse.serve import examples
from lt4rec_sparse.serve.model import version_of
from lt4rec_sparse.serve.oip import HEADER_LENGTH

CALLERS = 8
REPLACED_EVERY = 0.5  # seconds


def measure(artefact: Path, seconds: float) -> dict[str, Any]:
    """Return how many requests were answered, refused, lost and wrong, and how often the artefact was replaced."""
    ranker = load(artefact)
    requests = examples.made(ranker.encoder, CALLERS, CANDIDATES)
    bodies = [infer_body(ranker, request) for request in requests]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        files = [folder / "first.safetensors", folder / "second.safetensors", folder / "bad.safetensors"]
        shutil.copy(artefact, files[0])
        save(ranker, files[1], embeddings="fp16" if ranker.inputs.kind == "int8" else "int8")
        files[2].write_bytes(files[0].read_bytes()[:-1])
        wanted = {}
        for file in files[:2]:
            of_file = load(file)
            wanted[version_of(str(file))] = [of_file.rank(columns(request), k=K) for request in requests]
        served = folder / "model.safetensors"
        shutil.copy(files[0], served)
        with server(served, MODELS["engine fp32"], 0, watch_seconds=0.05, threads=2) as url:
            path = infer_path(url)
            counts, replaced = asyncio.run(_soak(path, bodies, wanted, files, served, seconds))
    return {"seconds": seconds, "callers": CALLERS, "replaced": replaced, "versions": len(wanted), **counts}


async def _soak(path: str, bodies: Any, wanted: Any, files: Any, served: Path, seconds: float) -> Any:
    counts: Counter[str] = Counter(dict.fromkeys(("answered", "refused", "lost", "wrong"), 0))
    seen: set[str] = set()
    until = time.perf_counter() + seconds

    async def call(session: aiohttp.ClientSession, caller: int) -> None:
        chance = random.Random(caller)
        data, headers = base64.b64decode(bodies[caller]["data"]), bodies[caller]["headers"]
        while time.perf_counter() < until:
            is_bad = chance.randrange(4) == 0
            sent = data[: chance.randrange(len(data))] if is_bad else data
            try:
                async with session.post(path, data=sent, headers=headers) as response:
                    answer = await response.read()
            except (aiohttp.ClientError, asyncio.TimeoutError):
                counts["lost"] += 1
                continue
            if is_bad:
                counts["refused" if 400 <= response.status < 500 else "wrong"] += 1
            elif response.status != 200:
                counts["lost"] += 1
            else:
                content = json.loads(answer[: int(response.headers[HEADER_LENGTH])])
                seen.add(content["model_version"])
                counts["answered" if _is_right(answer, content, wanted, caller) else "wrong"] += 1

    async def replace() -> int:
        times = 0
        while time.perf_counter() < until:
            await asyncio.sleep(REPLACED_EVERY)
            times += 1
            new = served.with_name("new.safetensors")
            await asyncio.to_thread(shutil.copy, files[times % len(files)], new)
            new.replace(served)
        return times

    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        replaced, *_ = await asyncio.gather(replace(), *(call(session, caller) for caller in range(CALLERS)))
    return {**counts, "versions_seen": len(seen)}, replaced


def _is_right(answer: bytes, content: dict[str, Any], wanted: Any, caller: int) -> bool:
    """Tell whether an answer is exactly the ranking of the version that it names."""
    if content["model_version"] not in wanted:
        return False
    ranking = wanted[content["model_version"]][caller]
    values = {**ranking.scores, "rank_score": ranking.rank_scores, "row": ranking.rows}
    return answer.endswith(
        b"".join(np.ascontiguousarray(values[output["name"]]).tobytes() for output in content["outputs"])
    )
