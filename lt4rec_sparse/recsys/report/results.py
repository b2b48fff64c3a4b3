"""The contents of a run's `results.json`, and what the parts of its report ask of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lt4rec_sparse.recsys.harness.rows import BASE, HARD, SMALL
from lt4rec_sparse.recsys.harness.statistics import Difference, is_clear, paired_difference, summary
from lt4rec_sparse.recsys.metrics import HIGHER_IS_BETTER, LOSS, MAIN_METRIC
from lt4rec_sparse.recsys.tables import values_of

# What the served model is compared with first: row -> words for it.
OPPONENTS = {BASE: "single-task models", HARD: "hard sharing", HARD + SMALL: "a dense network with as many weights"}

Results = Mapping[str, Any]  # the contents of `results.json`


class Run:
    """Parts of `results.json`."""

    def __init__(self, results: Results) -> None:
        self.results, self.data, self.config = results, results["data"], results["config"]
        self.tasks: Mapping[str, str] = self.data["tasks"]
        self.records: list[dict[str, Any]] = results["records"]
        self.titles: Mapping[str, str] = results["rows"]
        self.frozen: Mapping[str, Any] = results["frozen"]
        self.left_out: Mapping[str, str] = results.get("left_out", {})
        self.seeds: int = self.config["seeds"]
        # The row that `model.safetensors` holds, the first one frozen; the row whose tickets the report shows, if any.
        self.served: str = next(iter(self.frozen))
        tickets = [record for record in self.records if record["tickets"]]
        self.searched = [record for record in tickets if record["row"] == tickets[0]["row"]]

    def mean(self, row: str, task: str, metric: str) -> float:
        """Return a row's metric of a task on the test days, over the seeds."""
        return summary(list(values_of(self.records, row, task, metric).values())).mean

    def difference(self, row: str, task: str, metric: str | None = None) -> Difference:
        """Return by how much the served row's metric of a task, by default the main one, exceeds another row's."""
        metric = metric or MAIN_METRIC[self.tasks[task]]
        mine, others = (values_of(self.records, which, task, metric) for which in (self.served, row))
        return paired_difference(mine, others, metric in LOSS.values())

    def is_beaten(self, row: str, task: str, metric: str | None = None) -> bool:
        """Return whether a row is better than the served one at a task: over several seeds, clearly (`is_clear`)."""
        metric = metric or MAIN_METRIC[self.tasks[task]]
        difference = self.difference(row, task, metric)
        return is_gain(-difference.mean, metric) and (difference.seeds == 1 or is_clear(difference))

    def cost(self, row: str, what: str) -> float:
        """Return a number of a row's records, such as "multiply_adds": of its models together, the mean over seeds."""
        return float(sum(record[what] for record in self.records if record["row"] == row)) / self.seeds

    def seconds(self, row: str) -> float:
        """Return the processor time of training a row and of finding its masks: the mean over seeds."""
        times = (sum(record["seconds"].values()) for record in self.records if record["row"] == row)
        return float(sum(times)) / self.seeds

    def timings(self, row: str) -> dict[int, dict[str, Mapping[str, float]]]:
        """Return a frozen row's times: candidates -> path -> a `Timing`."""
        timings: dict[int, dict[str, Mapping[str, float]]] = {}
        for timed in self.frozen[row]["latency"]:
            timings.setdefault(timed["candidates"], {})[timed["path"]] = timed
        return timings

    def us(self, row: str) -> dict[int, dict[str, float]]:
        """Return a frozen row's median microseconds: candidates -> path -> time."""
        timings = self.timings(row).items()
        return {size: {path: timed["median_us"] for path, timed in paths.items()} for size, paths in timings}


def is_gain(difference: float, metric: str) -> bool:
    """Return whether a difference of a metric, or of a loss, is in the good direction."""
    return difference > 0 if HIGHER_IS_BETTER.get(metric, False) else difference < 0


def path_of(precision: str) -> str:
    """Return what `freeze_and_compare` calls the sparse MLP of a precision."""
    return "sparse, MLP alone" if precision == "fp32" else f"sparse {precision}, MLP alone"
