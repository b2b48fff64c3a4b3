"""The page of an update: what trained, and the model before and after on days that neither was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lt4rec_sparse.recsys.metrics import LOSS, MAIN_METRIC
from lt4rec_sparse.recsys.tables import table

Results = Mapping[str, Any]  # the contents of an update's `results.json`


def verdict(results: Results) -> str:
    """Return each task's main metric before and after, in one line."""
    parts = []
    for task, kind in results["tasks"].items():
        metric = MAIN_METRIC[kind]
        old, new = (results[which][task][metric] for which in ("before", "after"))
        parts.append(f"{task} {metric.upper()} {old:.5f} before, {new:.5f} after")
    return f"on {_span(results['days']['validation'])}: {'; '.join(parts)}"


def page(results: Results) -> str:
    """Return the page as Markdown."""
    start, days, rows = results["started_from"], results["days"], results["rows"]
    lines = []
    for task, kind in results["tasks"].items():
        for metric in dict.fromkeys((MAIN_METRIC[kind], LOSS[kind])):
            old, new = (results[which][task][metric] for which in ("before", "after"))
            lines.append([task, metric, f"{old:.5f}", f"{new:.5f}", f"{new - old:+.5f}"])
    parts = [
        "# Update",
        f"`{results['model']}` trained on with {_span(days['train'])}: {rows['train']:,} rows, once and in order, in "
        f"{results['steps']:,} steps per task of {results['batch_size']:,} rows. Masks are as they were. Weights "
        f"started as the artefact holds them (embeddings {start['embeddings']}, network {start['network']}), "
        "moments of Adam at zero.",
        f"Both models on {_span(days['validation'])}, {rows['validation']:,} rows that neither was trained on:",
        table(["task", "metric", "before", "after", "difference"], lines),
        f"New rows of embeddings: {_grown(results['grown'])}.",
        f"Seconds: {results['seconds']['train']:.1f} of training (all cores together), "
        f"{results['seconds']['all']:.1f} in all.",
    ]
    return "\n\n".join(parts) + "\n"


def _grown(sizes: Mapping[str, Mapping[str, int]]) -> str:
    more = {name: rows["after"] - rows["before"] for name, rows in sizes.items()}
    named = ", ".join(f"{name} {count:,}" for name, count in more.items() if count)
    return f"{sum(more.values()):,} ({named})" if named else "none"


def _span(days: Sequence[str]) -> str:
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
