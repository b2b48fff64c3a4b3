"""The GPU suites: `python -m bench gpu` runs them on a GPU, `python -m bench gpu --dry OUT` rehearses them on a CPU.

Each suite runs in a process of its own, for an illegal access ends a process' CUDA for good, and writes its part after
every case. A suite has a share of the seconds and drops the cases that come last when they are spent; the record says
which. `bash bench/gpu.sh` installs, tests and then calls this.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

from bench import record
from lt4rec_sparse.experiments.report import table

SUITES = {"assumptions": 0.08, "serving": 0.47, "training": 0.3, "kernels": 0.15}  # name -> share of the seconds
SECONDS = 270.0
GRACE_S = 20.0  # for a suite's start and for the case that it is in when its seconds are spent
NOT_TIMED = "The GPU engine is compiled and interpreted, not yet timed."
HEADERS = {
    "a": "(a) eager masked, as called",
    "c": "(c) eager dense, as called",
    "b": "(b) torch.compile + graph",
    "b'": "(b') engineered dense",
}


def main(arguments: Sequence[str]) -> int:
    """Run all suites, or one; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench gpu")
    parser.add_argument("--dry", type=Path, metavar="OUT", help="rehearse on the CPU and write OUT")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all suites together")
    parser.add_argument("--steps", type=Path, help="what bench/gpu.sh did before: name, seconds, code, last line")
    parser.add_argument("--suite", choices=SUITES, help="one suite alone, in this process")
    parser.add_argument("--part", type=Path, help="where that suite writes")
    options = parser.parse_args(arguments)
    if options.suite:
        return run_suite(options.suite, options.seconds, options.part, options.dry is not None)
    result = run(options.seconds, options.dry is not None, _steps(options.steps))
    if options.dry:
        path = options.dry
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    else:
        path = record.write(f"{_slug(result['gpu']['name'])}-{result['machine']['commit']}", result)
    print(path)
    print(report(result))
    return 0 if is_whole(result) else 1


def run(seconds: float, is_dry: bool, steps: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Run every suite in a process of its own, a GPU's one after another, and return the record."""
    end = time.monotonic() + seconds
    waiting = list(SUITES)

    def run_next(folder: str) -> tuple[str, dict[str, Any]]:
        left = end - time.monotonic()
        share = SUITES[waiting[0]] / sum(SUITES[name] for name in waiting)
        name = waiting.pop(0)
        return name, _run_alone(name, max(1.0, left * share), Path(folder) / f"{name}.json", is_dry)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(SUITES) if is_dry else 1) as pool:
        parts = dict(pool.map(run_next, [folder] * len(SUITES)))
    device = next((case for case in parts["assumptions"]["cases"] if case["case"] == "device"), {"name": "gpu"})
    return {
        "machine": record.machine(),
        "gpu": {key: value for key, value in device.items() if key not in ("case", "seconds")},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "is_dry": is_dry,
        "steps": list(steps),
        "suites": parts,
    }


def _run_alone(name: str, seconds: float, part: Path, is_dry: bool) -> dict[str, Any]:
    """Run a suite in a process of its own and return what it wrote, were it only some of its cases."""
    start = time.monotonic()
    command = [sys.executable, "-m", "bench", "gpu", "--suite", name, "--part", str(part), "--seconds", str(seconds)]
    environment = dict(os.environ)
    if is_dry:
        command += ["--dry", str(part)]
        environment["TRITON_INTERPRET"] = "1"
    try:
        code: int | str = subprocess.run(command, env=environment, timeout=seconds + GRACE_S).returncode
    except subprocess.TimeoutExpired:
        code = "ended: out of time"
    found = json.loads(part.read_text(encoding="utf-8")) if part.exists() else {}
    empty: dict[str, Any] = {"cases": [], "failed": [], "dropped": []}
    return {"code": code, "wall_s": time.monotonic() - start, **empty, **found}


def run_suite(name: str, seconds: float, part: Path, is_dry: bool) -> int:
    """Run one suite's cases while there are seconds left, and write `part` after each; return the exit code."""
    start = time.monotonic()
    from bench import gpu_setting  # Triton, which a process that only prints does without

    suite: gpu_setting.Suite = import_module(f"bench.gpu_{name}").suite
    setting = gpu_setting.dry() if is_dry else gpu_setting.on_gpu()
    cases: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    waiting = list(suite(setting))
    while waiting and time.monotonic() - start < seconds:
        case, measure = waiting.pop(0)
        began = time.monotonic()
        try:
            found = measure()
        except gpu_setting.FAILURES as error:
            failed.append({"case": case, "error": gpu_setting.named(error)})
            print(f"{name}, {case}: {failed[-1]['error']}", file=sys.stderr)
        else:
            cases.append({"case": case, **found, "seconds": round(time.monotonic() - began, 2)})
        dropped = [name for name, _ in waiting]
        part.write_text(json.dumps({"cases": cases, "failed": failed, "dropped": dropped}), encoding="utf-8")
    return 1 if failed else 0


def is_whole(result: dict[str, Any]) -> bool:
    """Tell whether every step before and every suite ended well; dropped cases and absent opponents are no failure."""
    wrong = [
        who
        for part in result["suites"].values()
        for case in part["cases"]
        for who in (*case.get("failed", {}), *(who for who in case.get("absent", {}) if who.startswith("ours")))
    ]
    return not wrong and all(done["code"] == 0 for done in (*result["steps"], *result["suites"].values()))


def report(result: dict[str, Any]) -> str:
    """Return the tables of a record as Markdown, what went wrong last."""
    suites = result["suites"]
    parts = [
        f"{result['gpu']['name']}, commit {result['machine']['commit']}, torch {result['gpu'].get('torch')}, "
        f"Triton {result['gpu'].get('triton')}",
        "### Assumptions",
        assumptions_table(suites["assumptions"]["cases"]),
        "### Tiles: the fastest, the table's choice over it, cuBLAS over it",
        tiles_table(suites["kernels"]["cases"]),
        "### A training step: time of the opponent over ours",
        training_table(suites["training"]["cases"]),
        "### Serving: time of the opponent over ours",
        serving_table(suites["serving"]["cases"]),
        "### Steps",
        _steps_table(result),
    ]
    wrong = [
        *(f"- {name}, {failure['case']}: {failure['error']}" for name, s in suites.items() for failure in s["failed"]),
        *(
            f"- {name}, {case['case']}, {who}: {why}"
            for name, s in suites.items()
            for case in s["cases"]
            for who, why in _failures(case).items()
        ),
    ]
    return "\n\n".join([*parts, "### Failed or absent", "\n".join(wrong) or "nothing"])


def readme_section() -> str:
    """Return what the README says of the GPU: the ratios of the newest record, or that there is none."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(record.RESULTS.glob("*.json"))]
    timed = [found for found in records if "suites" in found and "gpu" in found and not found["is_dry"]]
    if not timed:
        return NOT_TIMED
    newest = max(timed, key=lambda found: str(found["date"]))
    suites, gpu = newest["suites"], newest["gpu"]
    where = f"{gpu['name']}, torch {gpu['torch']}, Triton {gpu['triton']}, commit {newest['machine']['commit']}"
    return "\n\n".join(
        [
            f"Serving two tasks, bf16, time of the opponent over ours ({where}):",
            serving_table(suites["serving"]["cases"]),
            "A training step, likewise:",
            training_table(suites["training"]["cases"]),
        ]
    )


def serving_table(cases: Sequence[dict[str, Any]]) -> str:
    """Return a row a case: the plan's choice, its time, and the ratios; those to (a) and (c) as Python calls them."""
    rows = []
    for case in cases:
        ratios = case["ratios"]
        if not ratios:
            continue
        name, ours = next((n, c) for n, c in case["contestants"].items() if c["kind"] == "ours")
        cells = [_cell(ratios, kind, "called" if kind in ("a", "c") else "replayed") for kind in HEADERS]
        cold = _cell(ratios, "b'", "cold")
        rows.append(
            [
                f"{case['network']} {case['structure']}",
                f"{case['sparsity']:.0%}",
                str(case["batch"]),
                name.removeprefix("ours "),
                f"{ours['replayed']['median_us']:.1f}",
                *cells,
                cold,
                _cell(ratios, "b'", "called"),
                _cell(ratios, "b'", "weight_bytes"),
            ]
        )
    header = ["network", "sparsity", "batch", "ours by", "us", *HEADERS.values()]
    return table([*header, "(b') cold", "(b') as called", "(b') bytes of weights"], rows)


def training_table(cases: Sequence[dict[str, Any]]) -> str:
    """Return a row a case: the time of ours, and the ratios."""
    rows = []
    for case in cases:
        if not case.get("ratios"):
            continue
        us = {name: facts["called"]["median_us"] for name, facts in case["contestants"].items()}
        ratios = case["ratios"]
        rows.append(
            [
                case["arithmetic"],
                str(case["batch"]),
                *(f"{us[name]:.0f}" if name in us else "" for name in ("ours", "ours compiled")),
                *(_cell(ratios, who, what) for who in ("eager", "torch.compile") for what in ("called", "replayed")),
                _cell(ratios, "torch.compile", "peak_bytes"),
            ]
        )
    header = ["arithmetic", "batch", "ours, us", "compiled, us", "eager", "eager, GPU", "torch.compile"]
    return table([*header, "torch.compile, GPU", "torch.compile, peak memory"], rows)


def tiles_table(cases: Sequence[dict[str, Any]]) -> str:
    """Return a row a case."""
    rows = []
    for case in cases:
        if case["best"]:
            us = case["contestants"][case["best"]]["median_us"]
            shares = [case["own_over_best"], case["cublas_over_best"]]
            cells = ["" if share is None else f"{share:.2f}" for share in shares]
            rows.append([case["case"], case["best"].removeprefix("tile "), f"{us:.1f}", *cells])
    return table(["case", "fastest tile", "us", "the table's", "cuBLAS"], rows)


def assumptions_table(cases: Sequence[dict[str, Any]]) -> str:
    """Return a row a figure."""
    rows = []
    for case in cases:
        rows += [[f"graph node, {name}", f"{us:.2f} us"] for name, us in case.get("node_us", {}).items()]
        timings = {**case.get("launch_us", {}), **case.get("products", {})}
        rows += [[f"{case['case']}, {name}", f"{timing['median_us']:.1f} us"] for name, timing in timings.items()]
        rows += [[case["case"], f"{case[unit]:,.0f} {unit}"] for unit in ("gbps", "tflops") if unit in case]
    return table(["what", "measured"], rows)


def _cell(ratios: dict[str, dict[str, float]], kind: str, figure: str) -> str:
    return f"{ratios[kind][figure]:.2f}" if figure in ratios.get(kind, {}) else ""


def _failures(case: dict[str, Any]) -> dict[str, str]:
    return {**case.get("failed", {}), **case.get("absent", {})}


def _steps_table(result: dict[str, Any]) -> str:
    rows = [[s["step"], f"{s['seconds']:.0f}", str(s["code"]), s["last"]] for s in result["steps"]]
    for name, part in result["suites"].items():
        said = f"{len(part['cases'])} cases, {len(part['failed'])} failed, {len(part['dropped'])} dropped"
        rows.append([name, f"{part['wall_s']:.0f}", str(part["code"]), said])
    return table(["step", "seconds", "code", "last line"], rows)


def _steps(path: Path | None) -> list[dict[str, Any]]:
    """Read what bench/gpu.sh wrote: a line a step, tabs between its parts."""
    if path is None:
        return []
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return [
        {"step": step, "seconds": float(seconds), "code": int(code), "last": last}
        for step, seconds, code, last in lines
    ]


def _slug(name: str) -> str:
    """Return a GPU's name for a file: "NVIDIA H200" is "h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia")).strip("-") or "gpu"
