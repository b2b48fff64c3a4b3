"""The README's tables, made from the committed results; `tests/test_readme.py` tells whether they are up to date."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from bench import experiments, gpu, gpu_bytes, record
from bench.cpu import PRECISIONS, best, ratio, speed_table
from lt4rec_sparse.recsys.harness.rows import BASE, S_WEIGHT_LAST
from lt4rec_sparse.recsys.metrics import MAIN_METRIC
from lt4rec_sparse.recsys.report import precision_section
from lt4rec_sparse.recsys.tables import comparison_table, table

# What decides of a mask; the whole table stands with the experiment.
TICKETS = (
    "random_rescaled",
    "random_disjoint_rescaled",
    "random",
    "random_like",
    "ticket",
    "ticket_rescaled",
    "ticket_layer",
    "ticket_layer_rescaled",
    "ticket_longer",
    "ticket_rewound",
    "separate_0.0",
    "random_separate_1.0",
    "one_ticket",
    "base_small",
    "hard_sharing_small",
    "base",
    "hard_sharing",
)
README = Path(__file__).parents[1] / "README.md"


def write() -> None:
    """Rewrite the parts of the README that stand between `<!-- results: NAME -->` and `<!-- end -->`."""
    README.write_text(generated(), encoding="utf-8")


def generated() -> str:
    """Return the README as the committed results make it."""
    text = README.read_text(encoding="utf-8")
    for name, make in SECTIONS.items():
        pattern = rf"(<!-- results: {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"{README}: got {found} parts 'results: {name}', wanted 1")
    return text


def _headline() -> str:
    at = {c["sparsity"]: c for c in record.read("cpu")["cases"] if c["batch"] == 256 and c["threads"] == 1}
    sizes = record.read("kuairand_pure")["results"]["frozen"][S_WEIGHT_LAST]["bytes"]
    smaller = sizes["dense, one model per task: MLPs"] / sizes["sparse sharing: MLP, canonical"]
    speeds = " and ".join(
        f"**{ratio(at[0.8], p):.1f}x / {ratio(at[0.9], p):.1f}x** the speed of the best dense {p} engine"
        for p in ("fp32", "int8")
    )
    return (
        f"- {speeds}, at 80 % / 90 % sparsity (256 candidates, one thread).\n"
        f"- **{smaller:.1f}x** smaller: the MLP of two KuaiRand tasks at 20 % density against a dense MLP each."
    )


def _table2() -> str:
    return experiments.main_table("kuairand_pure_table2")


def _tickets() -> str:
    return experiments.main_table("kuairand_pure_tickets", "random_rescaled", rows=TICKETS)


def _tasks() -> str:
    return experiments.main_table("kuairand_pure_tasks")


def _granularity() -> str:
    results = experiments.read("kuairand_pure_granularity")
    measured = results["further"]["serving"]
    sizes = next(iter(measured.values()))["microseconds"]
    metrics = [(task, MAIN_METRIC[kind]) for task, kind in results["tasks"].items()]
    rows = []
    for key, of_row in measured.items():
        found = [record for record in results["records"] if record["row"] == key]
        means = (fmean(r["test"]["all"][task][metric] for r in found) for task, metric in metrics)
        times = (f"{us:,.0f}" for us in of_row["microseconds"].values())
        adds = f"{fmean(r['multiply_adds'] for r in found):,.0f}"
        rows.append([results["rows"][key], *(f"{mean:.5f}" for mean in means), adds, *times, of_row["way"]])
    header = ["network", *(f"{task} {metric.upper()}" for task, metric in metrics), "multiply-adds"]
    return table([*header, *(f"µs at {size}" for size in sizes), "served as"], rows)


def _training() -> str:
    found = record.read("training")
    steps, search = found["steps"], found["search"]
    rows = [[name, f"{rate:,.0f}"] for name, rate in steps["rows_per_second"].items()]
    of = steps["rows_per_second"]
    ratios = [of[f"lt4rec_sparse, {dtype}"] / of["torch-rechub"] for dtype in ("fp32", "bf16")]
    return "\n\n".join(
        [
            table(["MMoE, the same rows, features, widths and batch", "rows a second"], rows),
            f"{ratios[0]:.1f}x as fast as torch-rechub as its users run it in fp32, {ratios[1]:.1f}x in bf16, which it "
            "does not offer. The search of both tasks' tickets, single-task baselines included, on the same two cores: "
            f"{search['ours_s']:.0f} s (two processes, bf16, the baseline as first round), where the plain loop takes "
            f"{search['plain_s']:.0f} s (fp32, two threads, baselines apart).",
        ]
    )


def _simulated() -> str:
    results = record.read("simulated")["results"]
    return comparison_table(results["records"], results["rows"], BASE, results["data"]["tasks"])


def _speed() -> str:
    cpu = record.read("cpu")
    parts = []
    for precision in PRECISIONS:
        opponents = sorted({best(case, "dense", [precision])[0] for case in cpu["cases"]})
        parts += [f"Against dense {precision} (the fastest of {', '.join(opponents)}):", speed_table(cpu, precision)]
    versions = ", ".join(f"{name} {version}" for name, version in cpu["machine"]["peers"].items())
    parts.append(f"{cpu['mlp']}, {_where(cpu['machine'])}, {versions}, engine {cpu['engine']}.")
    return "\n\n".join(parts)


def _no_amx() -> str:
    without = record.read("cpu_no_amx")
    parts = []
    for precision in ("bf16", "int8"):
        parts += [f"Against dense {precision} of torch and OpenVINO:", speed_table(without, precision)]
    return "\n\n".join(parts)


def _microseconds() -> str:
    cpu = record.read("cpu")
    peak = cpu["roofline"]["fp32_gflops"]
    rows = []
    for case in cpu["cases"]:
        if case["threads"] == 1 and case["sparsity"] == 0.9:
            ours = [f"{case['contestants'][f'ours {p}']['median_us']:,.0f}" for p in PRECISIONS]
            dense = [f"{us:,.0f} ({name})" for name, us in (best(case, "dense", [p]) for p in PRECISIONS)]
            useful = [
                2e-3 * case["nnz"] * case["batch"] / case["contestants"][f"ours {p}"]["median_us"] / peak
                for p in ("fp32", "int8")
            ]
            rows.append([str(case["batch"]), *ours, *dense, *(f"{share:.0%}" for share in useful)])
    header = ["batch", *(f"sparse {p}" for p in PRECISIONS), *(f"dense {p}" for p in PRECISIONS)]
    reads = ", ".join(f"{name} {gbps:.0f}" for name, gbps in cpu["roofline"]["read_gbps"].items())
    note = (
        f"The last columns: products of kept weights against this core's measured {peak:.0f} GFLOP/s of dense fp32 "
        f"(bf16 {cpu['roofline']['bf16_gflops']:.0f}; reads, GB/s: {reads})."
    )
    return f"{table([*header, 'fp32: of peak', 'int8: of fp32 peak'], rows)}\n\n{note}"


def _engine() -> str:
    cpu = record.read("cpu")
    prepack = [
        [f"{case['sparsity']:.0%}", f"{case['canonical_bytes']:,}"]
        + [
            f"{case['precisions'][p]['bytes']:,} in {case['precisions'][p]['median_us'] / 1e3:.1f} ms"
            for p in PRECISIONS
        ]
        for case in cpu["prepack"]
    ]
    two = []
    for case in cpu["two_tasks"]:
        times = {name: c["median_us"] for name, c in case["contestants"].items()}
        two.append(
            [str(case["batch"]), *(f"{times[f'two tasks {p}'] / times[f'one task {p}']:.2f}" for p in PRECISIONS)]
        )
    tickets = [
        [case["task"], str(case["batch"]), *(f"{ratio(case, p):.1f}" for p in PRECISIONS)] for case in cpu["tickets"]
    ]
    cold = []
    for case in cpu["cold"]:
        temperatures = {
            t: {"contestants": {n: {**c, **c[t]} for n, c in case["contestants"].items()}} for t in ("hot", "cold")
        }
        cells = [f"{ratio(temperatures[t], p):.1f}" for p in PRECISIONS for t in ("hot", "cold")]
        cold.append([str(case["batch"]), f"{case['sparsity']:.0%}", *cells])
    even = ", ".join(f"{p} {'not reached' if s is None else f'{s:.0%}'}" for p, s in cpu["break_even"].items())
    overlap = cpu["two_tasks"][0]["overlap"]
    return "\n\n".join(
        [
            f"Sparsity from which sparse beats the best dense of its precision, at 256 candidates: {even}.",
            f"Time of two tasks whose masks overlap by {overlap:.0%} (80 % sparsity), over that of one:",
            table(["batch", *PRECISIONS], two),
            "Real tickets (KuaiRand, last level), speed against the best dense of each precision:",
            table(["task", "batch", *PRECISIONS], tickets),
            "Hot, and with every cache overwritten between calls (DRAM-cold), against the best dense likewise:",
            table(["batch", "sparsity", *(f"{p} {t}" for p in PRECISIONS for t in ("hot", "cold"))], cold),
            "Bytes on disk, and prepacked in memory:",
            table(["sparsity", "canonical", *PRECISIONS], prepack),
        ]
    )


def _bytes() -> str:
    rows = []
    for name in ("kuairand_pure", "simulated"):
        results = record.read(name)["results"]
        for row, frozen in results["frozen"].items():
            sizes = frozen["bytes"]
            mlps = sizes["dense, one model per task: MLPs"]
            dense = sizes["dense, one model per task: embeddings"] + mlps
            parts = (
                dense,
                sizes["artefact on disk"],
                sizes["embeddings"],
                mlps,
                sizes["sparse sharing: MLP, canonical"],
            )
            rows.append([f"{name}, {results['rows'][row]}", *(f"{part:,}" for part in parts)])
    header = ["model", "dense, a model per task", "artefact", "of it embeddings", "dense MLPs", "sparse MLP"]
    return table(header, rows)


def _served() -> str:
    rows = []
    for name in ("kuairand_pure", "simulated"):
        results = record.read(name)["results"]
        for row, frozen in results["frozen"].items():
            differences = ", ".join(f"{task} {value:.1e}" for task, value in frozen["largest_difference"].items())
            rows.append([f"{name}, {results['rows'][row]}", differences])
    return table(["model", "largest difference of a served probability, all test rows"], rows)


def _precision() -> str:
    return precision_section(record.read("kuairand_pure")["results"])


def _gpu() -> str:
    compiled = record.read("gpu_compiled")["triton"]
    counts = ", ".join(
        f"{sum(len(chips) for chips in cases.values())} under Triton {version}" for version, cases in compiled.items()
    )
    found = record.read("gpu_bytes")
    return "\n\n".join(
        [
            gpu.readme_section(),
            f"Kernels compiled for sm_80, sm_90 and sm_100, in every tile that the tables may pick: {counts}; none "
            "spills registers, and their figures are committed, so that a change shows.",
            "Two tasks' hidden weights, how many times smaller than a dense bfloat16 copy per task "
            f"({found['mlp']}, masks that overlap by {found['overlap']:.0%}):",
            gpu_bytes.bytes_table(found),
        ]
    )


def _commands() -> str:
    rows = [[f"`{c['command']}`", f"{c['seconds']:.0f}"] for c in record.read("commands")["commands"]]
    return table(["command, on 2 cores", "seconds"], rows)


def _where(machine: dict[str, Any]) -> str:
    return f"{machine['cores']} cores of {machine['processor']}, torch {machine['torch']}"


SECTIONS: dict[str, Callable[[], str]] = {
    "headline": _headline,
    "table2": _table2,
    "tickets": _tickets,
    "granularity": _granularity,
    "tasks": _tasks,
    "training": _training,
    "simulated": _simulated,
    "speed": _speed,
    "no_amx": _no_amx,
    "microseconds": _microseconds,
    "engine": _engine,
    "bytes": _bytes,
    "served": _served,
    "precision": _precision,
    "gpu": _gpu,
    "commands": _commands,
}
