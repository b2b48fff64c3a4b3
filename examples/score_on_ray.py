"""Score candidates in any number of Parquet files on Ray.

`python examples/score_on_ray.py MODEL CANDIDATES OUT KEEP`: candidates are what `lt4rec-sparse candidates` writes, a
column for every feature. The result has the columns KEEP, such as `user_id,video_id`, and one per task. Every worker
loads the model once, from a path that all of them can read.
"""

import sys
from functools import partial

import pyarrow as pa
import ray

from lt4rec_sparse.recsys.scoring import CHUNK_ROWS, score


def score_files(model: str, candidates: str, out: str, keep: tuple[str, ...]) -> None:
    """Write the scores of every row, as Parquet files in the folder `out`."""
    scored = partial(score, model=model, keep=keep)

    def of_block(block: pa.Table) -> pa.Table:
        batches = block.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], block.schema)]
        return pa.Table.from_batches(map(scored, batches))

    ray.data.read_parquet(candidates).map_batches(
        of_block, batch_format="pyarrow", batch_size=CHUNK_ROWS
    ).write_parquet(out)


if __name__ == "__main__":
    score_files(*sys.argv[1:4], tuple(sys.argv[4].split(",")))
