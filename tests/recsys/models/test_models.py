import pytest
import torch
from oracle import Layer, assert_rounding, mlp_reference

from lt4rec_sparse import freeze
from lt4rec_sparse.masks import Mask
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.recsys.models import HardSharing, SparseSharing


@pytest.mark.parametrize("kind", [SparseSharing, HardSharing])
def test_a_frozen_model_answers_as_the_trained_one(small_log, kind):
    torch.manual_seed(0)
    inputs = CrossedEmbeddings(small_log.encoder.fields, small_log.encoder.table_sizes, dim=4)
    model = kind(inputs, ("ctr", "cvr"), (16, 8)).eval()
    mlps = {task: model.mlp if kind is SparseSharing else model.mlps[task] for task in model.tasks}
    generator = torch.Generator().manual_seed(0)
    for task, mlp in mlps.items():
        half = {name: kept.numel() // 2 for name, kept in mlp.mask(task).items()}
        mlp.set_mask(Mask.random(mlp.mask(task).shapes, half, generator), task)
    frozen = freeze(model)
    features = next(small_log.stream("test", 50, shuffle=False).epoch(0)).features
    with torch.no_grad():
        x = model.inputs(features)
    for i, (task, mlp) in enumerate(mlps.items()):
        layers = [
            Layer((layer.weight * layer.mask(task)).detach(), layer.bias.detach(), "relu")
            for layer in mlp.masked_layers()
        ]
        head = mlp.heads[task]
        reference = mlp_reference(x, [*layers, Layer(head.weight.detach(), head.bias.detach(), "none")])
        for y in (frozen(features, task), frozen(features)[:, i : i + 1], model(features, task).detach()):
            assert_rounding(y, reference)
