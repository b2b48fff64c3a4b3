"""Small inputs of every sort for the tests of ranking models: two single-valued fields, two bags, empty ones too."""

import torch
from oracle import small_integers
from torch import Tensor, nn

from lt4rec_sparse.ranker.features import EncodedFeatures

FIELDS = [("video", "video", False), ("hour", "hour", False), ("tags", "tag", True), ("past", "video", True)]
SIZES = {"video": 5, "tag": 4, "hour": 3}
STARTS = {"video": 0, "tag": 5, "hour": 9}  # of each table in the one matrix of `CrossedEmbeddings`
SINGLE = [[0, 1], [4, 2], [3, 0], [1, 1]]
BAGS = [[[0, 3], [], [2], [1, 1]], [[4], [0, 2], [], [1]]]  # one or two values, so that a mean of integers is exact
TASKS = ("ctr", "cvr", "like")


def features() -> EncodedFeatures:
    """The rows of `SINGLE` and `BAGS`."""
    lengths = [len(bag) for field in BAGS for bag in field]
    values = [value for field in BAGS for bag in field for value in bag]
    return EncodedFeatures(torch.tensor(SINGLE), torch.tensor(values), torch.tensor([0, *lengths]).cumsum(0))


def naive_vectors(embedding: Tensor) -> list[list[Tensor]]:
    """Row by row, the vector of each field; a mean over a bag, zero for an empty one."""
    rows = []
    for row, ids in enumerate(SINGLE):
        vectors = [embedding[STARTS[t] + i] for t, i in zip(("video", "hour"), ids, strict=True)]
        for table, bags in zip(("tag", "video"), BAGS, strict=True):
            values = [embedding[STARTS[table] + i] for i in bags[row]]
            vectors.append(torch.stack(values).mean(0) if values else torch.zeros_like(embedding[0]))
        rows.append(vectors)
    return rows


def with_integers(model: nn.Module, seed: int = 0) -> nn.Module:
    """Make every parameter small integers, so that sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(small_integers(*parameter.shape, generator=generator))
    return model


def reached(model: nn.Module, loss: Tensor) -> set[str]:
    """Names of the parameters that a loss gives a gradient to."""
    model.zero_grad()
    loss.backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}
