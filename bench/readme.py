"""The README's tables, made from the committed results; `check` tells whether they are up to date."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import record
from bench.cpu import ratio
from lt4rec_sparse.experiments.arms import SPARSE_LAST, TITLES
from lt4rec_sparse.experiments.report import accuracy_table, table

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
    at = {c["sparsity"]: c for c in record.read("cpu")["cases"] if c["batch"] == 256 and c["threads"] == 2}
    sizes = record.read("kuairand_pure")["results"]["frozen"][SPARSE_LAST]["bytes"]
    smaller = sizes["dense, one model a task: MLPs"] / sizes["sparse sharing: MLP, canonical"]
    return (
        f"- **{ratio(at[0.8]):.1f}x / {ratio(at[0.9]):.1f}x** the speed of dense torch at 80 % / 90 % sparsity "
        "(256 candidates, fp32, 2 threads).\n"
        f"- **{smaller:.1f}x** smaller: the MLP of two KuaiRand tasks at 20 % density against a dense MLP each."
    )


def _kuairand() -> str:
    results = record.read("kuairand_pure")["results"]
    parts = [f"All tabs:\n\n{accuracy_table(results, 'all')}", f"Tab 0 alone:\n\n{accuracy_table(results, 'tab_0')}"]
    return "\n\n".join(parts)


def _simulated() -> str:
    return accuracy_table(record.read("simulated")["results"], "all")


def _speed() -> str:
    cpu = record.read("cpu")
    rows = []
    for threads in sorted({case["threads"] for case in cpu["cases"]}):
        for sparsity in (0.8, 0.9):
            at = {c["batch"]: c for c in cpu["cases"] if c["threads"] == threads and c["sparsity"] == sparsity}
            rows.append([str(threads), f"{sparsity:.0%}", *(f"{ratio(at[batch]):.1f}" for batch in (1, 32, 256, 1024))])
    header = ["threads", "sparsity", "batch 1", "32", "256", "1024"]
    return f"{table(header, rows)}\n\n{cpu['mlp']}, {_where(cpu['machine'])}, engine {cpu['engine']}."


def _bytes() -> str:
    rows = []
    for name in ("kuairand_pure", "simulated"):
        for arm, frozen in record.read(name)["results"]["frozen"].items():
            sizes = frozen["bytes"]
            mlps = sizes["dense, one model a task: MLPs"]
            dense = sizes["dense, one model a task: embeddings"] + mlps
            parts = (
                dense,
                sizes["artefact on disk"],
                sizes["embeddings"],
                mlps,
                sizes["sparse sharing: MLP, canonical"],
            )
            rows.append([f"{name}, {TITLES[arm]}", *(f"{part:,}" for part in parts)])
    header = ["model", "dense, a model a task", "artefact", "of it embeddings", "dense MLPs", "sparse MLP"]
    return table(header, rows)


def _served() -> str:
    rows = []
    for name in ("kuairand_pure", "simulated"):
        for arm, frozen in record.read(name)["results"]["frozen"].items():
            differences = ", ".join(f"{task} {value:.1e}" for task, value in frozen["largest_difference"].items())
            rows.append([f"{name}, {TITLES[arm]}", differences])
    return table(["model", "largest difference of a served probability, all test rows"], rows)


def _commands() -> str:
    rows = [[f"`{c['command']}`", f"{c['seconds']:.0f}"] for c in record.read("commands")["commands"]]
    return table(["command, on 2 cores", "seconds"], rows)


def _where(machine: dict[str, Any]) -> str:
    return f"{machine['cores']} cores of {machine['processor']}, torch {machine['torch']}"


SECTIONS: dict[str, Callable[[], str]] = {
    "headline": _headline,
    "kuairand": _kuairand,
    "simulated": _simulated,
    "speed": _speed,
    "bytes": _bytes,
    "served": _served,
    "commands": _commands,
}
