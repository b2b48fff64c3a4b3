"""A server under load: the same server with the engine, dense torch or ONNX Runtime behind it, at rising rates.

A request is one of 256 candidates in binary tensors, of which the best ten are asked for. The server has one core and
one thread, the load another core and another process (`bench/load.py`). At each rate every model is asked in turn. One
whose 99th percentile passes 20 ms, or that fails a request, is asked again; if that is so twice, it is not asked at
higher rates. A case does not count where the load itself came late by a fifth of 20 ms at its 99th percentile.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np

from bench import record
from bench.served import columns
from lt4rec_sparse import Ranker, load
from lt4rec_sparse.recsys.tables import table
from lt4rec_sparse.serve import examples
from lt4rec_sparse.serve.oip import HEADER_LENGTH
from lt4rec_sparse.serve.settings import Settings

ROOT = Path(__file__).parents[1]
CANDIDATES, K, REQUESTS = 256, 10, 32
LIMIT_MS = 20.0  # of the 99th percentile
LATE_SHARE = 0.2  # of LIMIT_MS: by how much the load's 99th percentile may be sent late, which counts as latency
TRIES = 2  # of one model at one rate
OVERHEAD_S = 3.0  # of a case beside its seconds: two starts of the load, and a second to warm up
AGREED = 5  # of the best ten, the least number that an opponent must have in common with us to be timed
OURS = "lt4rec_sparse.ranker:load"


@dataclass(frozen=True)
class Model:
    """What is behind the routes: the server's loader, and the precision it is asked for."""

    loader: str
    precision: str


MODELS = {
    "engine fp32": Model(OURS, "fp32"),
    "engine int8": Model(OURS, "int8"),
    "dense torch fp32": Model("bench.served:dense_torch", "fp32"),
    "dense ONNX Runtime int8": Model("bench.served:dense_onnx_int8", "fp32"),
}


@dataclass(frozen=True)
class Load:
    """Rates in requests per second, from `first` up by `factor`.

    Each lasts at least `seconds` and `requests`, and less where the whole run would not end within `budget_s` seconds.
    """

    first: float = 20.0
    factor: float = 1.3
    steps: int = 16
    seconds: float = 6.0
    requests: int = 1000  # a 99th percentile then rests on ten
    budget_s: float = 660.0

    def rate(self, step: int) -> float:
        """Return the rate of a step."""
        return self.first * self.factor**step

    def seconds_of(self, step: int, left_s: float, models: int, going: int) -> float:
        """Return how long a case lasts, so that those still to come fit into the time that is left.

        Args:
            step: The case's place among the rates.
            left_s: Seconds that are left of the budget.
            models: How many are still to be asked at this step, the case's with them.
            going: How many will be asked at the steps after it.
        """
        wanted = [max(self.seconds, self.requests / self.rate(i)) for i in range(step, self.steps)]
        to_come = models * (wanted[0] + OVERHEAD_S) + going * sum(seconds + OVERHEAD_S for seconds in wanted[1:])
        share = left_s * (wanted[0] + OVERHEAD_S) / to_come
        return min(wanted[0], share - OVERHEAD_S)


def run(folder: Path) -> None:
    """Measure a run's artefact and write `results/serving.json`, beside the records of other processors."""
    machine = record.machine()
    measured = measure(folder / "model.safetensors", Load())
    records = record.read("serving") if (record.RESULTS / "serving.json").exists() else {}
    records[machine["processor"]] = {"machine": machine, **measured}
    record.write("serving", records)
    print(table_of(records[machine["processor"]]))


def measure(artefact: Path, load_: Load) -> dict[str, Any]:
    """Return, per model, one entry per rate: percentiles in milliseconds, requests answered and failed."""
    load_average = os.getloadavg()[0]
    ranker = load(artefact)
    requests = examples.made(ranker.encoder, REQUESTS, CANDIDATES)
    bodies = [infer_body(ranker, request) for request in requests]
    cores = sorted(os.sched_getaffinity(0))
    wanted = ranker.rank(columns(requests[0]), k=K).rows.tolist()
    names = [name for name in MODELS if ranker.mlp.network.quantization is not None or MODELS[name].precision != "int8"]
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with ExitStack() as stack:
        urls = {name: stack.enter_context(server(artefact, MODELS[name], cores[0])) for name in names}
        for name, url in urls.items():
            agreed = len(set(best(url, bodies[0])) & set(wanted))
            if agreed < (K if name == "engine fp32" else AGREED):
                raise ValueError(
                    f"{name}: got {agreed} of the best {K} candidates, wanted more: it ranks another model"
                )
        going, ends_at = list(names), time.monotonic() + load_.budget_s
        for step in range(load_.steps):
            for place, name in enumerate(asked := list(going)):
                for seed in range(TRIES):
                    left = ends_at - time.monotonic()
                    seconds = load_.seconds_of(step, left, len(asked) - place, len(going))
                    if seconds < min(1.0, load_.seconds):
                        break  # the budget is spent
                    case = _case(urls[name], bodies, load_.rate(step), seconds, step * TRIES + seed, cores[-1])
                    measured[name].append(case)
                    if is_within(case, LIMIT_MS):
                        break
                else:
                    going.remove(name)
    limits = {"limit_ms": LIMIT_MS, "late_share": LATE_SHARE}
    settings = {"candidates": CANDIDATES, "k": K, **limits, "server_cores": 1, "load": asdict(load_)}
    return {"load_average": load_average, **settings, "models": measured}


def is_late(case: Mapping[str, Any], limit_ms: float) -> bool:
    """Tell whether the load of a case was not the one that was asked for."""
    return bool(case["late_ms"] > LATE_SHARE * limit_ms)


def is_within(case: Mapping[str, Any], limit_ms: float) -> bool:
    """Tell whether a server answered all requests of a case in time, and the load was what was asked for."""
    return not is_late(case, limit_ms) and not case["failed"] and bool(case["p99_ms"] <= limit_ms)


def table_of(measured: Mapping[str, Any]) -> str:
    """Return the highest rate of each model within the limit, and percentiles at the lowest one and there.

    A rate is "at least" one where it was the load that came late at the next, or the time that ended.
    """
    rows = []
    for name, cases in measured["models"].items():
        within = [case for case in cases if is_within(case, measured["limit_ms"])]
        first = f"{cases[0]['p50_ms']:.1f}, {cases[0]['p99_ms']:.1f}"
        if all(is_late(case, measured["limit_ms"]) for case in cases):
            rows.append([name, "the load came late", first, ""])
            continue
        if not within:
            rows.append([name, f"< {cases[0]['rate']:.0f}", first, ""])
            continue
        last = max(within, key=lambda case: case["rate"])
        beyond = [case for case in cases if case["rate"] > last["rate"]]
        is_found = any(not is_late(case, measured["limit_ms"]) for case in beyond)
        rows.append(
            [
                name,
                f"{'' if is_found else '≥ '}{last['rate']:.0f}",
                first,
                f"{last['p50_ms']:.1f}, {last['p99_ms']:.1f}",
            ]
        )
    limit, at = measured["limit_ms"], min(case["rate"] for cases in measured["models"].values() for case in cases)
    header = [f"requests of {measured['candidates']} candidates, one core", f"per second, p99 up to {limit:.0f} ms"]
    return table([*header, f"p50, p99 in ms at {at:.0f} per second", "p50, p99 in ms there"], rows)


@contextmanager
def server(artefact: Path, model: Model, core: int, **options: Any) -> Iterator[str]:
    """Start a server on one core with one thread, wait until it is ready, and give its address."""
    settings = Settings(
        str(artefact), model.precision, loader=model.loader, access_log=False, drain_seconds=0.0, **options
    )
    code = (
        "import sys; from lt4rec_sparse.serve.worker import *; run(settings_from(sys.argv[1]), '127.0.0.1', 0, 1, 30)"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with _on_core(core):
        process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(asdict(settings))],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
    assert process.stderr is not None
    drain = None
    try:
        lines: list[str] = []
        found = None
        while found is None:
            line = process.stderr.readline()
            if not line:
                raise RuntimeError(f"server: {''.join(lines)}")
            lines.append(line)
            found = re.search(r"running on (http://[\d.:]+)", line)
        # Read on: a server whose stderr is full would wait in its next warning.
        drain = threading.Thread(target=deque, args=(process.stderr, 0), daemon=True)
        drain.start()
        yield found[1]
    finally:
        process.terminate()
        process.wait(timeout=60)
        if drain is not None:
            drain.join(timeout=60)
        process.stderr.close()


def infer_body(ranker: Ranker, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return a made request in binary tensors, as `bench.load` sends it."""
    entries: list[dict[str, Any]] = []
    parts: list[bytes] = []

    def add(name: str, datatype: str, values: Sequence[Any]) -> None:
        if datatype == "BYTES":
            texts = [value.encode() for value in values]
            part = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
        else:
            part = np.array(values, {"INT64": "<i8", "FP64": "<f8"}[datatype]).tobytes()
        size = {"binary_data_size": len(part)}
        entries.append({"name": name, "datatype": datatype, "shape": [len(values)], "parameters": size})
        parts.append(part)

    given = columns(request)
    for column in ranker.encoder.schema.features:
        values = given[column.name]
        datatype = "FP64" if column.kind == "dense" else "INT64" if column.type == "int" else "BYTES"
        if column.kind == "multi":
            add(column.name, datatype, [value for bag in values for value in bag])
            add(f"{column.name}.offsets", "INT64", np.cumsum([0, *map(len, values)]).tolist())
        else:
            add(column.name, datatype, values)
    content = {"inputs": entries, "parameters": {"k": K, "binary_data_output": True}}
    text = json.dumps(content).encode()
    data = base64.b64encode(b"".join([text, *parts])).decode()
    return {"data": data, "headers": {HEADER_LENGTH: str(len(text)), "Content-Type": "application/octet-stream"}}


def infer_path(url: str) -> str:
    """Return where a server answers, by the name of its one model."""
    with urlopen(Request(f"{url}/v2/repository/index", method="POST")) as response:
        (model,) = json.load(response)
    return f"{url}/v2/models/{model['name']}/infer"


def best(url: str, body: Mapping[str, Any]) -> list[int]:
    """Return the rows that a server ranks highest."""
    with urlopen(Request(infer_path(url), base64.b64decode(body["data"]), body["headers"])) as response:
        answer, length = response.read(), int(response.headers[HEADER_LENGTH])
    *_, output = json.loads(answer[:length])["outputs"]
    assert output["name"] == "row"
    rows: list[int] = np.frombuffer(answer[-output["parameters"]["binary_data_size"] :], "<i8").tolist()
    return rows


def _case(url: str, bodies: Sequence[Any], rate: float, seconds: float, seed: int, core: int) -> dict[str, Any]:
    settings = {"url": infer_path(url), "bodies": bodies, "seed": seed, "timeout": 10.0}
    with _on_core(core):
        for duration in (min(1.0, seconds), seconds):  # the first warms connections and caches, and does not count
            given = json.dumps(settings | {"rate": rate, "seconds": duration})
            command = [sys.executable, "-m", "bench.load"]
            done = subprocess.run(command, cwd=ROOT, input=given, capture_output=True, text=True, check=True)
    answered = json.loads(done.stdout)
    latency = answered["latency_ms"] or [float("inf")]
    p50, p99 = (float(np.percentile(latency, percent)) for percent in (50, 99))
    counts = {"answered": len(answered["latency_ms"]), "failed": answered["failed"], "late_ms": answered["late_ms"]}
    return {"rate": rate, "seconds": seconds, "p50_ms": p50, "p99_ms": p99, **counts}


@contextmanager
def _on_core(core: int) -> Iterator[None]:
    """Let what is started meanwhile run on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def run_short(artefact: Path) -> None:
    """Run every line on two rates and print the table, whose times mean nothing."""
    print(table_of(measure(artefact, Load(first=5.0, factor=2.0, steps=2, seconds=1.0, requests=1))))
