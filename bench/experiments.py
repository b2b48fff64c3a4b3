"""Keep what an experiment found: its records, its page and its plots, and the machine that it ran on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import record
from lt4rec_sparse.recsys.tables import comparison_table

FOLDER = "experiments"
# What is kept of a record; what was declared is in the code, under the row's name.
KEPT = (
    "row",
    "seed",
    "key",
    "test",
    "seconds",
    "parameters",
    "multiply_adds",
    "best_level",
    "serving",
    "served",
    "microseconds",
)


def keep(folder: Path, name: str) -> Path:
    """Copy an experiment's folder into `results/experiments/<name>/`; return that.

    Args:
        folder: As `lt4rec-sparse experiment` leaves it: `records.json`, `report.md`, `plots/`.
        name: Names the data and the experiment, such as "kuairand_pure_table2".
    """
    results = json.loads((folder / "records.json").read_text(encoding="utf-8"))
    kept = record.RESULTS / FOLDER / name
    shutil.rmtree(kept, ignore_errors=True)
    (kept / "plots").mkdir(parents=True)
    shutil.copy(folder / "report.md", kept / "report.md")
    for plot in sorted((folder / "plots").glob("*.png")):
        shutil.copy(plot, kept / "plots" / plot.name)
    parts = [results, *results.get("cells", ())]
    for part in parts:
        if "records" in part:
            part["records"] = [_slim(found) for found in part["records"]]
    text = json.dumps({"machine": record.machine(), "results": results}, separators=(",", ":"))
    (kept / "records.json").write_text(text.replace('{"row"', '\n{"row"') + "\n", encoding="utf-8")
    return kept


def read(name: str) -> dict[str, Any]:
    """Return the results of an experiment that was kept."""
    path = record.RESULTS / FOLDER / name / "records.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["results"]
    return results


def main_table(name: str, base: str = "base", part: str = "all", rows: Sequence[str] = ()) -> str:
    """Return an experiment's table of main metrics, of some rows or of all."""
    results = read(name)
    # Titles in older records use "a" for "per".
    titles = {
        key: re.sub(r" a (task|layer|round)\b(?! further)", r" per \1", results["rows"][key])
        for key in rows or results["rows"]
    }
    return comparison_table(results["records"], titles, base, results["tasks"], part)


def _slim(found: dict[str, Any]) -> dict[str, Any]:
    slim = {key: found[key] for key in KEPT if found.get(key) is not None}
    masks, tickets = found.get("masks"), found.get("tickets")
    slim["masks"] = masks and {key: masks[key] for key in ("density", "layer_density", "overlap")}
    slim["tickets"] = tickets and {
        task: [{key: ticket[key] for key in ("level", "density", "validation")} for ticket in of_task]
        for task, of_task in tickets.items()
    }
    return slim
