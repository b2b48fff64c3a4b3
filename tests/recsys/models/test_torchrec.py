"""A model's embeddings may be TorchRec's, sharded over processes: the same model code, given the vectors of its fields.

TorchRec is no dependency: docs/scaling.md says how it is installed.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

RANK = """
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from oracle import assert_exact
from samples import FIELDS, SIZES, TASKS, features, with_integers
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.distributed.comm_ops import set_gradient_division
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.shard import shard
from torchrec.distributed.sharding_plan import column_wise, construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ShardingEnv

from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.recsys.models import SparseSharing

rank, folder, dim = int(sys.argv[1]), sys.argv[2], 8
columns = [column for column, _, _ in sorted(FIELDS, key=lambda field: field[2])]  # as `EncodedFeatures` has them


class Collected(CrossedEmbeddings):
    # Crosses vectors that TorchRec looks up.
    def __init__(self, tables):
        super().__init__(FIELDS, SIZES, dim, absent=SIZES)
        self.collection = tables

    def forward(self, features):
        lengths = torch.cat([torch.ones(features.single.numel(), dtype=torch.int64), features.multi_offsets.diff()])
        ids = torch.cat([features.single.T.flatten(), features.multi_values])
        return super().forward(features, self.collection(KeyedJaggedTensor(columns, ids, lengths=lengths)).to_dict())


def sharded(how):
    tables = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=table,
                embedding_dim=dim,
                num_embeddings=size,
                feature_names=[column for column, of, _ in FIELDS if of == table],
                pooling=PoolingType.MEAN,
            )
            for table, size in SIZES.items()
        ]
    )
    sharder = EmbeddingBagCollectionSharder()
    options = {"sharder": sharder, "local_size": 2, "world_size": 2, "device_type": "cpu"}
    plan = construct_module_sharding_plan(tables, how, **options)
    for parameter in plan.values():
        parameter.compute_kernel = "dense"  # gradients are left for an optimiser to step
    return shard(tables, plan, ShardingEnv.from_process_group(dist.group.WORLD), torch.device("cpu"), sharder)


def parts(tables):
    # Yields each local part of a table: name, rows, columns, the tensor.
    for name, value in tables.state_dict().items():
        for part in value.local_shards():
            (row, column), (rows, width) = part.metadata.shard_offsets, part.metadata.shard_sizes
            yield name.split(".")[1], slice(row, row + rows), slice(column, column + width), part.tensor


dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
set_gradient_division(False)  # a sum over the processes' rows, not a mean
whole = with_integers(SparseSharing(CrossedEmbeddings(FIELDS, SIZES, dim), TASKS, (6, 4)))
tables = sharded({table: table_wise(rank=place % 2) for place, table in enumerate(SIZES)})
model = SparseSharing(Collected(tables), TASKS, (6, 4))
model.mlp.load_state_dict(whole.mlp.state_dict())
wanted = whole.inputs.tables()
with torch.no_grad():
    for table, rows, width, tensor in parts(tables):
        tensor.copy_(wanted[table][rows, width])
batch = features()
own = batch.take(torch.arange(batch.batch)[rank::2])
logits = model(own)
assert_exact(logits, whole(own))
logits.sum().backward()
whole(batch).sum().backward()
gradients = dict(zip(SIZES, whole.inputs.embedding.grad.split(list(SIZES.values())), strict=True))
local = [parameter for parameter in tables.parameters() if parameter.numel()]
assert local, "each process holds a table"
for table, rows, width, tensor in parts(tables):
    (parameter,) = (p for p in local if p.data_ptr() == tensor.data_ptr())
    assert_exact(parameter.grad.view(tensor.shape), gradients[table][rows, width])
checkpoint.save({"tables": tables.state_dict()}, checkpoint_id=f"{folder}/checkpoint")
others = sharded({table: column_wise(ranks=[0, 1]) for table in SIZES})
state = {"tables": others.state_dict()}
checkpoint.load(state, checkpoint_id=f"{folder}/checkpoint")
seen = set()
for table, rows, width, tensor in parts(others):
    assert_exact(tensor, wanted[table][rows, width])
    seen.add(table)
assert seen == set(SIZES), "every table is cut by columns"
dist.destroy_process_group()
"""


@pytest.mark.heavy
@pytest.mark.skipif(find_spec("torchrec") is None, reason="TorchRec is not installed")
def test_sharded_embeddings_give_the_logits_and_gradients_of_whole_ones_and_checkpoints_are_cut_anew(tmp_path):
    """Small integers: every sum is exact."""
    ranks = []
    try:
        for rank in ("0", "1"):
            command = [sys.executable, "-c", RANK, rank, str(tmp_path)]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
            ranks.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
        for rank in ranks:
            _, errors = rank.communicate(timeout=240)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()
