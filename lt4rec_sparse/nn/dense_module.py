"""The way back: a frozen network as plain modules of torch, zeros where masks prune."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lt4rec_sparse.network import DenseLayer, FrozenNetwork

MODULES: dict[str, Callable[[float], nn.Module]] = {
    "relu": lambda slope: nn.ReLU(),
    "sigmoid": lambda slope: nn.Sigmoid(),
    "tanh": lambda slope: nn.Tanh(),
    "silu": lambda slope: nn.SiLU(),
    "gelu": lambda slope: nn.GELU(),
    "gelu_tanh": lambda slope: nn.GELU(approximate="tanh"),
    "hardswish": lambda slope: nn.Hardswish(),
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
}


def dense_module(network: FrozenNetwork, task: str) -> nn.Sequential:
    """Return one task's MLP as `nn.Linear` and activations, float32 on the CPU, without gradients.

    Example:
        >>> import torch
        >>> from lt4rec_sparse import SparseLinear
        >>> layer = SparseLinear.from_dense(torch.eye(2), activation="relu")
        >>> dense_module(layer.network, "task")
        Sequential(
          (0): Linear(in_features=2, out_features=2, bias=False)
          (1): ReLU()
        )

    Raises:
        ValueError: If there is no such task.
    """
    modules: list[nn.Module] = []
    for i in range(network.depth):
        layer = network.layer(i, task)
        modules.append(_linear(layer))
        if layer.activation != "none":
            modules.append(MODULES[layer.activation](layer.slope))
    return nn.Sequential(*modules).eval().requires_grad_(False)


def _linear(layer: DenseLayer) -> nn.Linear:
    linear = nn.Linear(layer.weight.shape[1], layer.weight.shape[0], layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.clone(), requires_grad=False)
    return linear
