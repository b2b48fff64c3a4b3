"""Train a ranker on tables in memory, look at how it did, and rank with it.

The ten lines are in `main`. The log is simulated: any table that speaks Arrow could stand in its place, such as a data
frame of pandas or polars, or a relation of duckdb. Without a schema the columns are guessed: see which became fields.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq

from lt4rec_sparse.recsys import Fitted, fit
from lt4rec_sparse.recsys.data import SimulatorConfig, simulate


def main() -> Fitted:
    """Simulate a log, fit, print, and return the ranker."""
    with TemporaryDirectory() as folder:
        log, users, videos = simulated(Path(folder) / "log")
    ranker = fit(log, joins={"user_id": users, "video_id": videos}, masks="random", hidden=[32, 16], embedding_dim=4)
    for task, metrics in ranker.metrics["test"].items():
        print(f"{task:10}", ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if value is not None))
    print("fields:", ", ".join(column.name for column in ranker.schema.features))
    visit = users.slice(0, 1).to_pydict() | {"hour": [20], "tab": [1], "duration_ms": [30_000]}
    ranked = ranker.rank(videos.slice(0, 5), context=visit, k=3)
    print("the best three of five videos, by their rows:", ranked.rows.tolist())
    return ranker


def simulated(folder: Path) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Return a small simulated log without its truth, its users and its videos."""
    simulate(SimulatorConfig(users=200, videos=80, impressions=2_500), folder)
    log = pq.read_table(folder / "log").drop_columns(["truth_click", "truth_watch"])
    return log, pq.read_table(folder / "users.parquet"), pq.read_table(folder / "videos.parquet")


if __name__ == "__main__":
    main()
