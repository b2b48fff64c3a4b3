"""A frozen network's executors, and the operators that stand for one in a traced graph.

On the CPU the executor is the native engine of `csrc/`; tests and benchmarks force one of its instruction sets through
`kernels.cpu.forced_isa`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Protocol, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lt4rec_sparse.kernels import cpu, reference
from lt4rec_sparse.network import PRECISIONS, FrozenNetwork

X_DTYPES = (torch.float32, torch.bfloat16)  # what every executor on the CPU reads, in every precision

_library = torch.library.Library("lt4rec_sparse", "FRAGMENT")
_library.define("sparse_mlp(Tensor x, Tensor prepacked, int outputs) -> Tensor")
_library.define("sparse_mlp_of(Tensor x, str name, int outputs) -> Tensor")
_named: WeakValueDictionary[str, Executor] = WeakValueDictionary()


class Executor(Protocol):
    """What runs a frozen network: the engine, dense torch, a mixture by plan, or a GPU's graphs."""

    network: FrozenNetwork
    precision: str

    def run(self, x: Tensor, out: Tensor) -> None:
        """Write every task's outputs, side by side.

        Args:
            x: `[rows, in_features]`; elements of a row stand side by side.
            out: `[rows, outputs]`, float32. Must not overlap `x`.

        Raises:
            ValueError: If a shape, dtype, device or stride is wrong.
        """

    def kernel_for(self, rows: int) -> str:
        """Name what runs a batch of so many rows: the engine's layout, or a plan's segments."""

    @property
    def prepacked_nbytes(self) -> dict[str, int]:
        """Layout -> bytes of what is held in memory beside the network."""


def executor(
    network: FrozenNetwork, precision: str = "fp32", device: torch.device | str = "cpu", layout: str | None = None
) -> Executor:
    """Return the default executor of a device: the engine on the CPU; dense torch without it or on another device.

    `layout` holds the engine to one of `layouts`.

    Raises:
        ValueError: If there is no such precision, or int8 is wanted of a network that is not calibrated.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, wanted one of {', '.join(PRECISIONS)}")
    if precision == "int8" and network.quantization is None:
        raise ValueError("network: got one without quantisation parameters, wanted a calibrated one for int8")
    if torch.device(device).type != "cpu":
        return reference.Executor(network, precision, device)
    if cpu.is_available():
        return cpu.Executor(network, precision, layout)
    warnings.warn(
        f"the native CPU engine is absent ({cpu.absence_reason()}): sparse MLPs run dense in torch. To get it, install "
        "a C++ compiler with OpenMP and then `pip install --force-reinstall --no-cache-dir --no-deps lt4rec-sparse`",
        RuntimeWarning,
        stacklevel=3,
    )
    return reference.Executor(network, precision)


def prepack(network: FrozenNetwork, precision: str = "fp32") -> Tensor:
    """Return the engine's blob of a network for every batch size: what `sparse_mlp` reads.

    Raises:
        RuntimeError: If the engine was not built.
        ValueError: As `executor`.
    """
    return cpu.prepack(network, precision)


def layouts(network: FrozenNetwork, precision: str = "fp32") -> tuple[str, ...]:
    """Return every layout that the engine can prepack a network in, fast here or not; nothing without the engine."""
    if not cpu.is_available():
        return ()
    if network.is_in_blocks:
        return ("blocks",)
    return cpu.describe(cpu.prepack(network, precision, cpu.UNSTRUCTURED)).layouts


def layout_nbytes(network: FrozenNetwork, precision: str = "fp32") -> dict[str, int]:
    """Return layout -> bytes of each that this machine takes for some batch size; nothing without the engine."""
    if not cpu.is_available():
        return {}
    layouts = cpu.describe(cpu.prepack(network, precision)).layouts
    return {layout: cpu.prepack(network, precision, (layout,)).numel() for layout in layouts}


def sparse_mlp(x: Tensor, prepacked: Tensor, outputs: int) -> Tensor:
    """Run all tasks' sparse MLPs over one `x`, in one call: `h = activation(h @ (weight * mask_task).T + bias)`.

    The operator for traced graphs (`torch.compile`, `torch.export`, `torch.jit.trace`); a module that is called eagerly
    saves its cost by calling an executor. Inference only. A pruned weight does not read its activation: `0 * inf` is
    not formed, where a dense product of masked weights would give NaN.

    Args:
        x: `[batch, in_features]`, float32 or bfloat16 on the CPU; rows may be strided.
        prepacked: What `prepack` made, uint8; it decides the precision.
        outputs: The sum of the tasks' last `out_features`, as prepacked.

    Returns:
        `[batch, outputs]`, float32; the tasks side by side, in the order of `prepack`.

    Raises:
        ValueError: If `x` is not `[batch, in_features]`, float32 or bfloat16, on the CPU.
    """
    if x.dim() != 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [batch, in_features]")
    if x.dtype not in X_DTYPES or x.device.type != "cpu":
        raise ValueError(f"x: got {x.dtype} on {x.device}, wanted torch.float32 or torch.bfloat16 on cpu")
    return cast(Tensor, torch.ops.lt4rec_sparse.sparse_mlp(x, prepacked, outputs))


def name_executor(name: str, executor: Executor) -> None:
    """Let `sparse_mlp_of` find an executor by a name of its own, while whoever made it keeps it."""
    _named[name] = executor


def sparse_mlp_of(x: Tensor, name: str, outputs: int) -> Tensor:
    """Run a network by the name of its executor: the operator for graphs that stay in this process.

    `torch.compile` sees it, and no weights: as in eager mode the executor prepacks the layout that each batch takes.

    Args:
        x: `[batch, in_features]`, float32 or bfloat16 on the CPU; rows may be strided.
        name: What `name_executor` was given.
        outputs: The sum of the tasks' last `out_features`.

    Returns:
        `[batch, outputs]`, float32.
    """
    return cast(Tensor, torch.ops.lt4rec_sparse.sparse_mlp_of(x, name, outputs))


def cpu_engine() -> str:
    """Name what runs frozen networks on this machine's CPU: an instruction set of the engine, or "reference"."""
    return cpu.isa() if cpu.is_available() else "reference"


def layer_inputs(network: FrozenNetwork, x: Tensor, task: str) -> Iterator[Tensor]:
    """Yield what enters each layer of one task's MLP, in the float32 of the reference; `x` comes first."""
    return reference.Executor(network, device=x.device).inputs(x, task)


def _sparse_mlp_cpu(x: Tensor, prepacked: Tensor, outputs: int) -> Tensor:
    rows = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_empty(x.shape[0], outputs, dtype=torch.float32)
    cpu.sparse_mlp(rows, prepacked, y)
    return y


_library.impl("sparse_mlp", _sparse_mlp_cpu, "CPU")


def _sparse_mlp_of_cpu(x: Tensor, name: str, outputs: int) -> Tensor:
    executor = _named.get(name)
    if executor is None:
        raise RuntimeError("sparse_mlp_of: got the graph of a module that is no more, wanted one that is kept")
    rows = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_empty(x.shape[0], outputs, dtype=torch.float32)
    executor.run(rows, y)
    return y


_library.impl("sparse_mlp_of", _sparse_mlp_of_cpu, "CPU")


@torch.library.register_fake("lt4rec_sparse::sparse_mlp")
@torch.library.register_fake("lt4rec_sparse::sparse_mlp_of")
def _sparse_mlp_fake(x: Tensor, network: Tensor | str, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs, dtype=torch.float32)


def _sparse_mlp_backward(ctx: Any, dy: Tensor) -> None:
    raise RuntimeError("sparse_mlp: got a backward pass, wanted inference only: train the MaskedMLP it was frozen from")


torch.library.register_autograd("lt4rec_sparse::sparse_mlp", _sparse_mlp_backward)
torch.library.register_autograd("lt4rec_sparse::sparse_mlp_of", _sparse_mlp_backward)
