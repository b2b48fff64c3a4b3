"""The GPU suites: `python -m bench gpu` runs them on a GPU, `python -m bench gpu --dry OUT` rehearses them on a CPU.

On a GPU each suite runs in its own process, because an illegal access ends CUDA in a process. It writes its part before
and after every case. It gets a share of the seconds that are left when it starts, and at least a minimum. When the
seconds are spent it drops the remaining cases (see the record). `bash bench/gpu.sh` installs, tests and runs it.
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
from importlib import import_module
from pathlib import Path
from typing import Any

from bench import record
from lt4rec_sparse.recsys.tables import table

SUITES = {"assumptions": 0.07, "serving": 0.48, "training": 0.29, "kernels": 0.16}  # name -> share of the seconds
# Enough to compile and time the first case, however long the suites and steps before it took.
MINIMUM_S = {"assumptions": 12.0, "serving": 60.0, "training": 40.0, "kernels": 18.0}
SECONDS = 270.0
GRACE_S = 20.0  # for the start of a suite and for the case that runs when its seconds are spent
NOT_TIMED = "The GPU engine is compiled and interpreted, not yet timed."
HEADERS = {
    "a": "(a) eager masked, as called",
    "c": "(c) eager dense, as called",
    "b": "(b) torch.compile + graph",
    "b'": "(b') engineered dense",
}


def main(arguments: Sequence[str]) -> int:
    """Run all suites, or some; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench gpu")
    parser.add_argument("--dry", type=Path, metavar="OUT", help="rehearse on the CPU and write OUT")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all suites together")
    parser.add_argument("--steps", type=Path, help="what bench/gpu.sh did before: name, seconds, code, last line")
    parser.add_argument("--suites", nargs="+", choices=SUITES, help="these suites alone, in this process")
    parser.add_argument("--parts", type=Path, help="the folder that they write to")
    options = parser.parse_args(arguments)
    if options.suites:
        is_dry = options.dry is not None
        return max(run_suite(s, options.seconds, options.parts / f"{s}.json", is_dry) for s in options.suites)
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
    """Run every suite, on a GPU each in a process of its own, and return the record."""
    end = time.monotonic() + seconds
    waiting = list(SUITES)
    parts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting:
            left = end - time.monotonic()
            names, own = (waiting, left) if is_dry else (waiting[:1], seconds_of_next(waiting, left))
            waiting = waiting[len(names) :]
            limit = max(own, min(own, left) + GRACE_S)  # no grace for a suite that has only its minimum left
            parts |= _run_apart(names, own, limit, Path(folder), is_dry)
    device = next((case for case in parts["assumptions"]["cases"] if case["case"] == "device"), {"name": "gpu"})
    return {
        "machine": record.machine(),
        "gpu": {key: value for key, value in device.items() if key not in ("case", "seconds")},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "is_dry": is_dry,
        "steps": list(steps),
        "suites": parts,
    }


def seconds_of_next(waiting: Sequence[str], left: float) -> float:
    """Return the first suite's share of what is left, but at least its minimum, and the others' minimum left over."""
    name, *others = waiting
    share = left * SUITES[name] / sum(SUITES[suite] for suite in waiting)
    return max(MINIMUM_S[name], min(share, left - sum(MINIMUM_S[other] for other in others)))


def _run_apart(
    names: Sequence[str], seconds: float, limit: float, folder: Path, is_dry: bool
) -> dict[str, dict[str, Any]]:
    """Run suites in a process, which ends at the limit, and return what each wrote, even if only some cases ended."""
    start = time.monotonic()
    command = [sys.executable, "-m", "bench", "gpu", "--suites", *names, "--parts", str(folder)]
    command += ["--seconds", str(seconds)]
    environment = dict(os.environ)
    if is_dry:
        command += ["--dry", str(folder)]
        environment["TRITON_INTERPRET"] = "1"
    try:
        code: int | str = subprocess.run(command, env=environment, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        code = "ended: out of time"
    parts: dict[str, dict[str, Any]] = {}
    for name in names:
        part = folder / f"{name}.json"
        found = json.loads(part.read_text(encoding="utf-8")) if part.exists() else {}
        empty: dict[str, Any] = {"cases": [], "failed": [], "dropped": []}
        parts[name] = {"code": code, "wall_s": time.monotonic() - start, **empty, **found}
    return parts


def run_suite(name: str, seconds: float, part: Path, is_dry: bool) -> int:
    """Run one suite's cases while there are seconds left, and write `part` after each; return the exit code."""
    start = time.monotonic()
    from bench import gpu_setting  # it imports Triton, which a process that only prints does not need

    suite: gpu_setting.Suite = import_module(f"bench.gpu_{name}").suite
    setting = gpu_setting.dry() if is_dry else gpu_setting.on_gpu()
    cases: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    waiting = list(suite(setting))

    def write() -> None:
        dropped = [name for name, _ in waiting]
        part.write_text(json.dumps({"cases": cases, "failed": failed, "dropped": dropped}), encoding="utf-8")

    write()  # a case that never ends is dropped, with those after it
    while waiting and time.monotonic() - start < seconds:
        case, measure = waiting[0]
        began = time.monotonic()
        try:
            found = measure()
        except gpu_setting.FAILURES as error:
            failed.append({"case": case, "error": gpu_setting.named(error)})
            print(f"{name}, {case}: {failed[-1]['error']}", file=sys.stderr)
        else:
            cases.append({"case": case, **found, "seconds": round(time.monotonic() - began, 2)})
        waiting.pop(0)
        write()
        setting.stopwatch.clear()
    return 1 if failed else 0


def is_whole(result: dict[str, Any]) -> bool:
    """Tell whether all earlier steps and all suites ended well; dropped cases and absent opponents are no failure."""
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
    """Return the README's text on the GPU: the ratios of the newest record, or that there is none."""
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
            "A training step, time of the opponent over ours:",
            training_table(suites["training"]["cases"]),
        ]
    )


def serving_table(cases: Sequence[dict[str, Any]]) -> str:
    """Return a row per case: the plan's choice, its time, and the ratios; those to (a) and (c) as Python calls them."""
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
    """Return a row per case: our time, and the ratios."""
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
    """Return a row per case."""
    rows = []
    for case in cases:
        if case["best"]:
            us = case["contestants"][case["best"]]["median_us"]
            shares = [case["own_over_best"], case["cublas_over_best"]]
            cells = ["" if share is None else f"{share:.2f}" for share in shares]
            rows.append([case["case"], case["best"].removeprefix("tile "), f"{us:.1f}", *cells])
    return table(["case", "fastest tile", "us", "the table's", "cuBLAS"], rows)


def assumptions_table(cases: Sequence[dict[str, Any]]) -> str:
    """Return a row per figure."""
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
    """Read what bench/gpu.sh wrote: one line per step, tabs between its parts."""
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
