"""Score candidates in any number of Parquet files on Spark.

`python examples/score_on_spark.py MODEL CANDIDATES OUT KEEP`: candidates are what `lt4rec-sparse candidates` writes, a
column for every feature. The result has the columns KEEP, such as `user_id,video_id`, and one per task. Every worker
loads the model once, from a path that all of them can read.
"""

import sys
from functools import partial

from pyspark.sql import SparkSession

from lt4rec_sparse import load
from lt4rec_sparse.recsys.scoring import score


def score_files(model: str, candidates: str, out: str, keep: tuple[str, ...]) -> None:
    """Write the scores of every row, as Parquet files in the folder `out`."""
    frame = SparkSession.builder.getOrCreate().read.parquet(candidates)
    tasks = load(model).tasks
    types = dict(frame.dtypes) | dict.fromkeys(tasks, "float")
    columns = ", ".join(f"`{name}` {types[name]}" for name in (*keep, *tasks))
    scored = partial(score, model=model, keep=keep)
    frame.mapInArrow(lambda batches: map(scored, batches), columns).write.parquet(out)


if __name__ == "__main__":
    score_files(*sys.argv[1:4], tuple(sys.argv[4].split(",")))
