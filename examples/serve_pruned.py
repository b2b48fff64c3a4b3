"""Serve a network that was pruned elsewhere, as it comes: by torch.nn.utils.prune, as a state dict, as a CSR matrix.

Each way prints the largest difference to what the network computed before, and the bytes that its weights take now.
"""

from __future__ import annotations

import io
import warnings

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lt4rec_sparse import SparseLinear, SparseMLP, freeze, report


def network() -> nn.Sequential:
    """Return a dense tower of 256-512-128-1 numbers."""
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 1)).eval()


def pruned_by_torch() -> nn.Sequential:
    """Return the tower as torch.nn.utils.prune leaves it: 90 % of its wide layers gone."""
    tower = network()
    for layer in (tower[0], tower[2]):
        prune.l1_unstructured(layer, "weight", amount=0.9)
    return tower


def from_module(tower: nn.Sequential) -> nn.Module:
    """Freeze the module itself: masks of torch.nn.utils.prune are read, prune.remove is not needed."""
    return freeze(tower)


def from_state_dict(file: io.BytesIO) -> nn.Module:
    """Freeze a checkpoint of plain weights, whose zeros are all that is left of the pruning."""
    tower = network()
    tower.load_state_dict(torch.load(file, weights_only=True))
    return freeze(tower)


def from_csr(matrices: list[Tensor], biases: list[Tensor]) -> nn.Module:
    """Serve matrices in CSR, as other libraries store them; scipy's are taken in the same way."""
    *hidden, last = zip(matrices, biases, strict=True)
    layers = [SparseLinear.from_csr(matrix, bias, "relu") for matrix, bias in hidden]
    return nn.Sequential(*layers, SparseLinear.from_csr(*last))


def main() -> list[tuple[str, float, int]]:
    """Serve the same network in each way, and print and return name, largest difference and bytes."""
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")  # torch says so of any CSR tensor
    torch.manual_seed(0)
    tower, x = pruned_by_torch(), torch.randn(64, 256)
    with torch.inference_mode():
        wanted = tower(x)
    served = {"torch.nn.utils.prune": from_module(tower)}
    linears = [layer for layer in tower if isinstance(layer, nn.Linear)]
    matrices = [layer.weight.detach().to_sparse_csr() for layer in linears]
    served["CSR matrices"] = from_csr(matrices, [layer.bias.detach() for layer in linears])
    for layer in (tower[0], tower[2]):
        prune.remove(layer, "weight")
    file = io.BytesIO()
    torch.save(tower.state_dict(), file)
    file.seek(0)
    served["state dict"] = from_state_dict(file)
    dense = sum(4 * parameter.numel() for parameter in tower.parameters())
    table = []
    for name, model in served.items():
        with torch.inference_mode():
            difference = (model(x) - wanted).abs().max().item()
        table.append((name, difference, sum(m.nbytes for m in model.modules() if isinstance(m, SparseMLP))))
    print(f"{'from':<22} {'largest difference':>18} {'bytes':>10}, of {dense:,} dense")
    for name, difference, nbytes in table:
        print(f"{name:<22} {difference:>18.1e} {nbytes:>10,}")
    print(report(served["state dict"]))
    return table


if __name__ == "__main__":
    main()
