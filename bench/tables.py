"""The tables of README.md and docs/, made from the committed results."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from bench import (
    daily,
    default,
    experiments,
    gpu,
    networks,
    prepare,
    processes,
    record,
    serving,
    sparse_training,
    training,
    wide,
)
from bench.cpu import KINDS, PRECISIONS, best, has, ratio, speed_table
from lt4rec_sparse.paper.equal_time import chosen_table
from lt4rec_sparse.recsys.harness.rows import BASE, S_WEIGHT
from lt4rec_sparse.recsys.metrics import MAIN_METRIC
from lt4rec_sparse.recsys.tables import comparison_table, table

# The rows that show which property of a mask matters; the whole table is in the experiment's report.
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
# What a reader of the headline knows a machine by.
MACHINES = {
    "AMD EPYC (family 23, model 1, stepping 2)": "a core with AVX2 alone",
    "Intel(R) Xeon(R) Processor (family 6, model 167, stepping 8)": (
        "a Sapphire Rapids, whose AMX units multiply dense bf16 and int8"
    ),
    "Intel(R) Xeon(R) Processor (family 6, model 207, stepping 2)": "an Emerald Rapids without AMX",
}
KUAIRAND_RUNS = ("kuairand_pure", "kuairand_pure_blocks")
RUNS = (*KUAIRAND_RUNS, "simulated")  # that were kept
ROOT = Path(__file__).parents[1]
BAR = 40  # characters of the longest bar


def pages() -> list[Path]:
    """Return every page that may hold a table."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def write() -> None:
    """Rewrite what is between `<!-- results: NAME -->` and `<!-- end -->` in every page."""
    for page, text in generated().items():
        page.write_text(text, encoding="utf-8")


def generated() -> dict[Path, str]:
    """Return each page as the committed results make it.

    Raises:
        ValueError: If a page names an unknown table, or a table is in no page or in several.
    """
    used: list[str] = []

    def made(match: re.Match[str]) -> str:
        name = match[1]
        if name not in SECTIONS:
            raise ValueError(f"results: got {name!r}, wanted one of {', '.join(SECTIONS)}")
        used.append(name)
        return f"<!-- results: {name} -->\n{SECTIONS[name]()}\n<!-- end -->"

    pattern = re.compile(r"<!-- results: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
    texts = {page: pattern.sub(made, page.read_text(encoding="utf-8")) for page in pages()}
    if sorted(used) != sorted(SECTIONS):
        raise ValueError(f"results: got {', '.join(sorted(used))}, wanted each of {', '.join(sorted(SECTIONS))} once")
    return texts


def _headline() -> str:
    speeds = []
    for (kind, words), cpu in product(reversed(KINDS.items()), record.read("cpu").values()):
        at = {c["sparsity"]: c for c in cpu["cases"] if c["batch"] == 256 and c["threads"] == 1}
        ratios = [
            f"**{ratio(at[0.8], p, kind):.1f}x / {ratio(at[0.9], p, kind):.1f}x** {p}"
            for p in PRECISIONS
            if has(at[0.8], kind, p) and _serves(at[0.8], p)
        ]
        if ratios:
            where = MACHINES.get(cpu["machine"]["processor"], cpu["machine"]["processor"])
            speeds.append(f"  - {words}, {where}: {', '.join(ratios)}.")
    mlp = next(iter(record.read("cpu").values()))["mlp"]
    sizes = record.read("memory")
    dense, narrow = (_dense_bytes(sizes, part) for part in (1.0, 0.25))
    canonical, prepacked = sizes["canonical_bytes"], sizes["layout_bytes"]["fp32"]["slices"]
    return "\n".join(
        [
            f"- **Speed.** Against the fastest dense engine of each precision, at 80 % / 90 % sparsity ({mlp}, 256 "
            "rows, one thread; below 1, dense is faster):",
            *speeds,
            f"- **Bytes.** Two KuaiRand tasks at 20 % density, fp32: **{dense / canonical:.1f}x** smaller on disk than "
            f"a dense MLP per task, **{dense / prepacked:.1f}x** smaller in memory once prepacked for large batches. A "
            f"dense MLP a quarter as wide is {dense / narrow:.1f}x smaller in both.",
        ]
    )


def _serves(case: dict[str, Any], precision: str) -> bool:
    """Tell whether someone would serve a dense network in a precision: whether it is no slower than fp32."""
    return has(case, "dense", precision) and best(case, "dense", [precision])[1] <= best(case, "dense", ["fp32"])[1]


def _models() -> str:
    """Quality, latency and bytes of the same two tasks; see `bench/memory.py` for the bytes of the masks."""
    results, sizes = experiments.read("kuairand_pure_granularity"), record.read("memory")
    prepacked = sizes["layout_bytes"]["fp32"]
    narrow, dense = (_dense_bytes(sizes, part) for part in (0.25, 1.0))
    bytes_of = {
        "hard_sharing": (dense, dense, dense),
        "hard_sharing_small": (narrow, narrow, narrow),
        "weight_last": (sizes["canonical_bytes"], prepacked["tables"], prepacked["slices"]),
    }
    titles = {
        "hard_sharing": "dense MLP per task",
        "hard_sharing_small": "dense, a quarter as wide",
        "weight_last": "sparse, 20 % per task (tickets)",
    }
    rows = []
    for row, title in titles.items():
        means = [f"{mean:.4f}" for mean in _means(results, row)]
        us = results["further"]["serving"][row]["microseconds"]
        rows.append(
            [title, *means, *(f"{us[n]:,.0f}" for n in ("1", "256")), *(f"{n / 1e6:.2f}" for n in bytes_of[row])]
        )
    header = ["model", "CTR AUC", "CVR MSE", "µs, 1 row", "µs, 256 rows", "MB on disk", "in memory, 1 row", "256 rows"]
    return table(header, rows)


def _frontier(name: str) -> str:
    results = experiments.read(name)
    return chosen_table(results["further"]["chosen"]["int8"], results["rows"], list(results["tasks"]))


def _plot() -> str:
    frozen = record.read("kuairand_pure_blocks")["results"]["frozen"][S_WEIGHT]
    us = {(x["path"], x["candidates"]): x["median_us"] for x in frozen["latency"]}
    paths = {
        "dense fp32": "dense, MLP alone",
        "sparse fp32": "sparse, MLP alone",
        "sparse int8": "sparse int8, MLP alone",
    }
    lines = []
    for size in sorted({candidates for _, candidates in us}):
        longest = max(us[path, size] for path in paths.values())
        for i, (name, path) in enumerate(paths.items()):
            bar = "█" * max(1, round(BAR * us[path, size] / longest))
            rows = f"{size:,} row{'s' if size > 1 else ''}" if i == 0 else ""
            lines.append(f"{rows:>10}  {name:<11} {bar} {us[path, size]:,.0f}")
    return "\n".join(["```text", *lines, "```"])


def _dense_bytes(sizes: dict[str, Any], part: float) -> int:
    """Bytes in fp32 of a dense MLP per task whose hidden layers are `part` as wide."""
    *hidden, last = sizes["widths"]
    widths = [sizes["in_features"], *(int(width * part) for width in hidden), last]
    return 4 * len(sizes["tasks"]) * sum(n * k + n for k, n in zip(widths[:-1], widths[1:], strict=True))


def _means(results: dict[str, Any], row: str) -> list[float]:
    found = [r["test"]["all"] for r in results["records"] if r["row"] == row]
    tasks = results["tasks"].items()
    return [fmean(test[task][MAIN_METRIC[kind]] for test in found if task in test) for task, kind in tasks]


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
    rows = []
    for key, of_row in measured.items():
        means = (f"{mean:.5f}" for mean in _means(results, key))
        times = (f"{us:,.0f}" for us in of_row["microseconds"].values())
        adds = fmean(r["multiply_adds"] for r in results["records"] if r["row"] == key)
        rows.append([results["rows"][key], *means, f"{adds:,.0f}", *times, of_row["way"]])
    metrics = (f"{task} {MAIN_METRIC[kind].upper()}" for task, kind in results["tasks"].items())
    header = ["network", *metrics, "multiply-adds"]
    return table([*header, *(f"µs at {size}" for size in sizes), "served as"], rows)


def _training() -> str:
    return "\n\n".join(
        f"{_where(found['machine'])}, threads: {found['threads']}:\n\n{training.tables_of(found)}"
        for found in record.read("training").values()
    )


def _embeddings() -> str:
    found = record.read("embeddings")
    judged, timings = found["judged"], found["timings_us"]
    metrics = [(task, metric) for task, of_task in judged["fp32"]["metrics"].items() for metric in of_task]
    rows = []
    for kind, of_kind in judged.items():
        line = [kind, *(f"{of_kind['metrics'][task][metric]:.5f}" for task, metric in metrics)]
        line += [f"{of_kind[part] / 1e6:.2f}" for part in ("embedding_bytes", "artefact_bytes")]
        rows.append([*line, *(f"{x[kind]['median_us']:,.0f}" for part in timings.values() for x in part.values())])
    header = ["embeddings", *(f"{task} {metric.upper()}" for task, metric in metrics), "MB", "artefact, MB"]
    header += [f"µs, {size}" for size in timings["request"]]
    header += [f"µs, {size}: lookups in {found['rows']:,} rows" for size in timings["lookup"]]
    load = found["load_average"]
    busy = f" Other work ran beside it (load {load:.1f}): compare within a column." if load > 0.5 else ""
    where = f"{found['data']}, test days; {_where(found['machine'])}, threads: {found['threads']}.{busy}"
    return f"{where}\n\n{table(header, rows)}"


def _request() -> str:
    found = record.read("request")
    parts = [
        f"{found['data']}, {found['fields']} fields, of which candidates have {found['in_common']} in common; "
        f"{_where(found['machine'])}."
    ]
    for name, of_threads in found["artefacts"].items():
        densities = ", ".join(f"{100 * x:.0f}" for x in next(iter(of_threads.values()))["densities"])
        for threads, measured in of_threads.items():
            timings = measured["timings_us"]
            sizes = list(timings)
            ways = list(timings[sizes[0]])
            base = {p: f"modules, every row, {p}" for p in ("fp32", "int8")}
            rows = []
            for way in ways:
                us = [timings[size][way]["median_us"] for size in sizes]
                first = [timings[size][base[way.rpartition(", ")[2]]]["median_us"] for size in sizes]
                rows.append([way, *(f"{t:,.0f} ({b / t:.1f})" for t, b in zip(us, first, strict=True))])
            header = ["way", *(f"{int(size):,} candidate{'s' if size != '1' else ''}, µs" for size in sizes)]
            what = f"`{name}` (layers at {densities} %), threads: {threads}"
            parts.append(f"{what}. In brackets: times as fast as the modules, of the same precision, every row.")
            parts.append(table(header, rows))
    return "\n\n".join(parts)


def _simulated() -> str:
    results = record.read("simulated")["results"]
    return comparison_table(results["records"], results["rows"], BASE, results["data"]["tasks"])


def _speed() -> str:
    parts = []
    for cpu in record.read("cpu").values():
        versions = ", ".join(f"{name} {version}" for name, version in cpu["machine"]["peers"].items())
        parts.append(f"**{cpu['mlp']}, {_where(cpu['machine'])}, {versions}, engine {cpu['engine']}.**")
        for precision, (kind, words) in product(PRECISIONS, KINDS.items()):
            cases = [case for case in cpu["cases"] if has(case, "dense", precision) and has(case, kind, precision)]
            if cases:
                opponents = sorted({best(case, "dense", [precision])[0] for case in cases})
                parts.append(f"{words} against dense {precision} (the fastest of {', '.join(opponents)}):")
                parts.append(speed_table(cpu, precision, kind))
    return "\n\n".join(parts)


def _per_machine(name: str, table_of: Callable[[dict[str, Any]], str]) -> str:
    parts = []
    for measured in record.read(name).values():
        parts += [f"{_where(measured['machine'])}, engine {measured['engine']}, one thread:", table_of(measured)]
    return "\n\n".join(parts)


def _wide() -> str:
    return _per_machine("wide", wide.table_of)


def _networks() -> str:
    if not (record.RESULTS / "networks.json").exists():
        return "Not measured yet."
    parts = []
    for measured in record.read("networks").values():
        parts += [f"{_where(measured['machine'])}, engine {measured['engine']}.", networks.tables_of(measured)]
    return "\n\n".join(parts)


def _sparse_training() -> str:
    parts = []
    for measured in record.read("sparse_training").values():
        parts += [f"{_where(measured['machine'])}, engine {measured['engine']}:", sparse_training.table_of(measured)]
    return "\n\n".join(parts)


def _default() -> str:
    return _per_machine("default", default.table_of)


def _no_amx() -> str:
    without = record.read("cpu_no_amx")
    parts = []
    for precision in ("bf16", "int8"):
        parts += [f"Against dense {precision} of torch and OpenVINO:", speed_table(without, precision)]
    return "\n\n".join(parts)


def _microseconds() -> str:
    return "\n\n".join(_microseconds_of(cpu) for cpu in record.read("cpu").values())


def _microseconds_of(cpu: dict[str, Any]) -> str:
    peak = cpu["roofline"]["fp32_gflops"]
    rows = []
    kinds = [kind for kind in KINDS if has(cpu["cases"][0], kind, "fp32")]
    dense = [precision for precision in PRECISIONS if has(cpu["cases"][0], "dense", precision)]
    for case in cpu["cases"]:
        if case["threads"] == 1 and case["sparsity"] == 0.9:
            us = {name: c["median_us"] for name, c in case["contestants"].items()}
            fastest = [f"{us:,.0f} ({name})" for name, us in (best(case, "dense", [p]) for p in dense)]
            useful = [
                2e-3 * case["nnz"] * case["batch"] / us[f"{kind} {p}"] / peak
                for kind, p in product(kinds, ("fp32", "int8"))
            ]
            ours = [f"{us[f'{kind} {p}']:,.0f}" for kind, p in product(kinds, PRECISIONS)]
            rows.append([str(case["batch"]), *ours, *fastest, *(f"{share:.0%}" for share in useful)])
    names = {"ours": "sparse", "blocks": "blocks"}
    header = ["batch", *(f"{names[kind]} {p}" for kind, p in product(kinds, PRECISIONS))]
    header += [f"dense {p}" for p in dense]
    header += [f"{names[kind]} {p}: of peak" for kind, p in product(kinds, ("fp32", "int8"))]
    reads = ", ".join(f"{name} {gbps:.0f}" for name, gbps in cpu["roofline"]["read_gbps"].items())
    bf16 = cpu["roofline"]["bf16_gflops"]
    note = (
        f"{_where(cpu['machine'])}. The last columns: arithmetic on kept weights against this core's measured "
        f"{peak:.0f} GFLOP/s of dense fp32 ({f'bf16 {bf16:.0f}; ' if bf16 else ''}reads, GB/s: {reads})."
    )
    return f"{table(header, rows)}\n\n{note}"


def _engine() -> str:
    return "\n\n".join(_engine_of(cpu) for cpu in record.read("cpu").values())


def _engine_of(cpu: dict[str, Any]) -> str:
    kinds = [kind for kind in KINDS if kind in cpu["break_even"]]
    two, cold = [], []
    for kind, case in product(kinds, cpu["two_tasks"]):
        us = {name: c["median_us"] for name, c in case["contestants"].items()}
        ratios = (us[f"{kind}, two tasks {p}"] / us[f"{kind}, one task {p}"] for p in PRECISIONS)
        two.append([KINDS[kind], str(case["batch"]), *(f"{ratio:.2f}" for ratio in ratios)])
    tickets = [
        [case["task"], str(case["batch"]), *(f"{ratio(case, p):.1f}" for p in PRECISIONS)] for case in cpu["tickets"]
    ]
    for kind, case in product(kinds, cpu["cold"]):
        temperatures = {
            t: {"contestants": {n: {**c, **c[t]} for n, c in case["contestants"].items()}} for t in ("hot", "cold")
        }
        cells = [
            f"{ratio(temperatures[t], p, kind):.1f}" if has(temperatures[t], "dense", p) else ""
            for p in PRECISIONS
            for t in temperatures
        ]
        cold.append([KINDS[kind], str(case["batch"]), f"{case['sparsity']:.0%}", *cells])
    even = "; ".join(
        f"{KINDS[kind]}: "
        + ", ".join(f"{p} {'not reached' if s is None else f'{s:.0%}'}" for p, s in cpu["break_even"][kind].items())
        for kind in kinds
    )
    overlap = cpu["two_tasks"][0]["overlap"]
    parts = [
        f"**{_where(cpu['machine'])}.** Sparsity from which sparse beats the best dense of its precision, at 256 "
        f"candidates: {even}.",
        f"Time of two tasks whose masks overlap by {overlap:.0%} (80 % sparsity), over that of one:",
        table(["kept in", "batch", *PRECISIONS], two),
    ]
    if tickets:
        parts += [
            "Real tickets (KuaiRand, last level), speed against the best dense of each precision:",
            table(["task", "batch", *PRECISIONS], tickets),
        ]
    parts += [
        "Hot, and DRAM-cold (every cache overwritten between calls), against the best dense timed in the same way:",
        table(["kept in", "batch", "sparsity", *(f"{p} {t}" for p in PRECISIONS for t in ("hot", "cold"))], cold),
    ]
    return "\n\n".join(parts)


def _frozen() -> str:
    parts = []
    for measured in record.read("frozen").values():
        rows = []
        for tasks, sparsity in sorted({(case["tasks"], case["sparsity"]) for case in measured["ready"]}):
            cases = [case for case in measured["ready"] if (case["tasks"], case["sparsity"]) == (tasks, sparsity)]
            row = [str(tasks), f"{sparsity:.0%}", f"{cases[0]['canonical_bytes']:,}"]
            for precision in PRECISIONS:
                for batch in sorted({case["batch"] for case in cases}):
                    (case,) = (c for c in cases if (c["precision"], c["batch"]) == (precision, batch))
                    share = case["prepacked_bytes"] / case["canonical_bytes"]
                    row.append(f"{case['median_us'] / 1e3:.1f} ms, {share:.2f}x")
            rows.append(row)
        batches = sorted({case["batch"] for case in measured["ready"]})
        header = [
            "tasks",
            "sparsity",
            "canonical bytes",
            *(f"{p}, {n} row{'s' * (n > 1)}" for p in PRECISIONS for n in batches),
        ]
        us = {name: call["median_us"] for name, call in measured["call"].items()}
        calls = (
            f"One row through a small MLP: {us['module']:.1f} us for the module's call, {us['score_into']:.1f} for "
            f"`score_into`, {us['engine']:.1f} for the engine alone. Of the module's, torch takes "
            f"{us['an empty module']:.1f} for calling any `nn.Module` and {us['torch.empty']:.1f} for `torch.empty`."
        )
        parts += [f"{_where(measured['machine'])}, one thread:", table(header, rows), calls]
    return "\n\n".join(parts)


def _bytes() -> str:
    rows = []
    for name in RUNS:
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
    header = ["model", "dense, one model per task", "artefact", "its embeddings", "dense MLPs", "sparse MLP"]
    return table(header, rows)


def _served() -> str:
    rows = []
    for name in RUNS:
        results = record.read(name)["results"]
        for row, frozen in results["frozen"].items():
            differences = ", ".join(f"{task} {value:.1e}" for task, value in frozen["largest_difference"].items())
            rows.append([f"{name}, {results['rows'][row]}", differences])
    return table(["model", "largest difference of a served probability, all test rows"], rows)


def _precision() -> str:
    return "\n\n".join(part for name in KUAIRAND_RUNS for part in _precisions_of(name))


def _precisions_of(name: str) -> Iterator[str]:
    kept = record.read(name)
    results = kept["results"]
    tasks = results["data"]["tasks"]
    header = ["precision"]
    for task, kind in tasks.items():
        header += [f"{task} {MAIN_METRIC[kind].upper()}", "against fp32"]
    for model, frozen in results["frozen"].items():
        sizes = sorted({x["candidates"] for x in frozen["latency"]})
        us = {(x["path"], x["candidates"]): x["median_us"] for x in frozen["latency"]}
        rows = []
        for precision, judged in frozen["precisions"].items():
            row = [precision]
            for task, kind in tasks.items():
                value, fp32 = (x["test"][task][MAIN_METRIC[kind]] for x in (judged, frozen["precisions"]["fp32"]))
                row += [f"{value:.5f}", f"{value / fp32 - 1:+.3%}" if kind == "ratio" else f"{value - fp32:+.5f}"]
            path = "sparse, MLP alone" if precision == "fp32" else f"sparse {precision}, MLP alone"
            row += [f"{max(judged['largest_difference'].values()):.1e}", *(f"{us[path, size]:.0f}" for size in sizes)]
            rows.append([*row, "yes" if judged["accepted"] else "no"])
        columns = [*header, "largest difference of a score", *(f"µs at {size}" for size in sizes), "accepted"]
        kept_by = results["config"].get("granularity", "weight")
        dense = ", ".join(f"{us['dense, MLP alone', size]:,.0f} at {size}" for size in sizes)
        yield (
            f"{results['rows'][model]}, pruned by {kept_by}, {_where(kept['machine'])}; dense fp32 takes {dense}:\n\n"
            f"{table(columns, rows)}"
        )


def _memory() -> str:
    sizes = record.read("memory")
    rows = [[f"dense, {name}", f"{b:,}", f"{b:,}"] for name, b in _dense_models(sizes).items()]
    rows += [
        [f"sparse {precision}, {layout}", f"{sizes['canonical_bytes']:,}", f"{nbytes:,}"]
        for precision, layouts in sizes["layout_bytes"].items()
        for layout, nbytes in layouts.items()
    ]
    return table(["MLPs of both tasks", "bytes on disk", "bytes in memory"], rows)


def _dense_models(sizes: dict[str, Any]) -> dict[str, int]:
    return {"an MLP per task": _dense_bytes(sizes, 1.0), "a quarter as wide": _dense_bytes(sizes, 0.25)}


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
            "Two tasks' hidden weights: how many times smaller than a dense bfloat16 copy per task "
            f"({found['mlp']}, masks that overlap by {found['overlap']:.0%}):",
            _smaller(found),
        ]
    )


def _smaller(found: dict[str, Any]) -> str:
    rows = []
    for case in found["cases"]:
        sizes = case["bytes"]
        rows.append([f"{case['sparsity']:.0%}", *(f"{sizes['premasked'] / size:.1f}x" for size in sizes.values())])
    return table(["sparsity", *found["cases"][0]["bytes"]], rows)


def _promises() -> str:
    found = record.read("promises")
    parts = []
    mutants = {name: found[name] for name in ("artefacts", "modules", "plans") if name in found}
    verdicts = sorted({verdict for of in mutants.values() for verdict in of["found"]["verdicts"]})
    rows = [
        [
            name,
            f"{of['found']['count']:,}",
            *(f"{of['found']['verdicts'].get(verdict, 0):,}" for verdict in verdicts),
            f"{len(of['found']['failures']):,}",
        ]
        for name, of in mutants.items()
    ]
    parts.append(table(["mutants of", "tried", *verdicts, "neither"], rows))
    crashes = found["crashes"]["found"]
    rows = [[name, f"{of['states']}", f"{of['broken']}"] for name, of in crashes.items()]
    parts.append(table(["crash while saving", "states", "broken"], rows))
    kills = found["kills"]["found"]
    parts.append(
        f"{kills['kills']:,} kills: {kills['left a temporary']:,} left a temporary, "
        f"{kills['left beside the next save']:,} were left by the next save, "
        f"{kills['neither old nor new']:,} files were neither old nor new."
    )
    rows = [
        [
            name,
            f"{of['file_bytes'] / 1e6:,.1f} MB",
            f"{of['peak_bytes'] / 1e6:,.1f} MB",
        ]
        for name, of in found["memory"]["found"].items()
    ]
    parts.append(table(["loading", "file", "memory at its peak, with the file's own pages"], rows))
    if "served" in found:
        of = found["served"]["found"]
        parts.append(
            f"{of['scores']:,} scores of {of['rows']:,} rows, which make {of['requests']:,} requests, were compared: "
            f"in {', '.join(of['precisions'])}, on {', '.join(of['isas'])}. None was wrong."
        )
    parts.append(f"On {_where(found['memory']['machine'])}, beside other work, so that no time is given.")
    return "\n\n".join(parts)


def _daily() -> str:
    found = record.read("daily")
    first, count = found["days"][: found["first"]], len(found["seeds"])
    how = f"The first model knows {first[0]} to {first[-1]}; {count} seeds. Seconds of training, all cores together."
    return f"{_where(found['machine'])}. {how}\n\n{daily.daily_table(found)}"


def _prepare() -> str:
    cases = record.read("prepare")["cases"]
    of = cases[-1]["machine"]["processor"]
    return f"{prepare.table_of(cases)}\n\nOn {of}, beside other work, which time of the core does not count."


def _processes() -> str:
    found = record.read("processes")
    return f"{_where(found['machine'])}, one thread per process:\n\n{processes.table_of(found['cases'])}"


def _commands() -> str:
    timed = record.read("commands")
    rows = [[c["command"], f"{c['seconds']:.0f}"] for c in timed["commands"]]
    return table([f"on {_where(timed['machine'])}", "seconds"], rows)


def _where(machine: dict[str, Any]) -> str:
    return f"{machine['cores']} cores of {machine['processor']}, torch {machine['torch']}"


def _serving() -> str:
    """Return a server's rates, per machine; there may be no record yet."""
    if not (record.RESULTS / "serving.json").exists():
        return "Not recorded yet: an idle machine is needed for it."
    parts = []
    for processor, measured in record.read("serving").items():
        parts.append(f"{processor}, commit {measured['machine']['commit']}:\n\n{serving.table_of(measured)}")
    return "\n\n".join(parts)


SECTIONS: dict[str, Callable[[], str]] = {
    "headline": _headline,
    "prepare": _prepare,
    "processes": _processes,
    "models": _models,
    "frontier": partial(_frontier, "kuairand_pure_frontier"),
    "frontier_census": partial(_frontier, "census_income_frontier"),
    "plot": _plot,
    "table2": _table2,
    "tickets": _tickets,
    "granularity": _granularity,
    "tasks": _tasks,
    "training": _training,
    "embeddings": _embeddings,
    "request": _request,
    "serving": _serving,
    "simulated": _simulated,
    "speed": _speed,
    "wide": _wide,
    "networks": _networks,
    "default": _default,
    "sparse_training": _sparse_training,
    "daily": _daily,
    "no_amx": _no_amx,
    "microseconds": _microseconds,
    "engine": _engine,
    "bytes": _bytes,
    "memory": _memory,
    "frozen": _frozen,
    "served": _served,
    "precision": _precision,
    "gpu": _gpu,
    "promises": _promises,
    "commands": _commands,
}
