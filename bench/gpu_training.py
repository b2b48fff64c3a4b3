"""A training step on a GPU: forward, both tasks' losses, backward, Adam; ours against the masked MLP in plain torch.

Timed as called, which a user sees, and as a graph of whole steps, which is the GPU's part of it.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gpu_serving import DRY_NETWORKS, NETWORKS, TASKS, masked_network
from bench.gpu_setting import FAILURES, Case, Setting, float32_precision, named
from lt4rec_sparse import MaskedMLP
from lt4rec_sparse.kernels.gpu import masked_linear
from tests.oracle import Layer, assert_rounding, mlp_reference

SPARSITY = 0.9
BATCHES, DRY_BATCHES = (2048, 8192, 512, 16384, 4096), (20,)
COMPILED_AT = (2048, 8192)  # first, with everything here including torch.compile, since it takes longest
ARITHMETICS = {"bf16": (True, "highest"), "tf32": (False, "high"), "fp32": (False, "highest")}  # autocast, float32's
PATHS = {"ours": None, "ours triton": "triton", "ours cublas": "cublas"}


def suite(setting: Setting) -> Iterator[Case]:
    """Yield the batches, those of the goals first; DDP last, since it may have no network to start on."""
    batches = DRY_BATCHES if setting.is_dry else BATCHES
    for arithmetic, batch in (("bf16", b) for b in batches):
        yield f"{arithmetic} batch {batch}", partial(_measure, setting, arithmetic, batch)
    yield f"bf16 DDP batch {batches[0]}", partial(_measure_ddp, setting, "bf16", batches[0])
    for arithmetic in ("tf32", "fp32"):
        for batch in batches[:2]:
            yield f"{arithmetic} batch {batch}", partial(_measure, setting, arithmetic, batch)


class PlainMaskedMLP(nn.Module):
    """The masked MLP as one would write it: `F.linear(h, weight * mask)`, task by task."""

    def __init__(self, mlp: MaskedMLP) -> None:
        super().__init__()
        self.tasks = mlp.tasks
        self.layers = nn.ModuleList(nn.Linear(layer.in_features, layer.out_features) for layer in mlp.masked_layers())
        self.heads = nn.ModuleList(deepcopy(mlp.heads[task]) for task in self.tasks)
        for i, (plain, masked) in enumerate(zip(self.layers, mlp.masked_layers(), strict=True)):
            plain.load_state_dict({"weight": masked.weight.detach(), "bias": masked.bias.detach()})
            self.register_buffer(f"masks{i}", masked.masks.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return every task's logits, side by side."""
        logits = []
        for t, head in enumerate(self.heads):
            h = x
            for i, layer in enumerate(self.layers):
                h = torch.relu(F.linear(h, layer.weight * self.get_buffer(f"masks{i}")[t], layer.bias))
            logits.append(head(h))
        return torch.cat(logits, dim=1)


class Step:
    """One training step of a module of its own."""

    def __init__(self, module: nn.Module, call: Callable[..., Any], x: Tensor, labels: Tensor, autocast: bool) -> None:
        self._call, self._x, self._labels, self._autocast = call, x, labels, autocast
        # Capturable: its count of steps is on the GPU, where a graph can raise it.
        self._adam = torch.optim.Adam(module.parameters(), fused=True, capturable=x.is_cuda)
        self._module = module

    def logits(self) -> Tensor:
        """Return the outputs of the forward pass."""
        # Casts are not cached: a graph would read those of the previous step.
        with torch.autocast(self._x.device.type, torch.bfloat16, enabled=self._autocast, cache_enabled=False):
            logits: Tensor = self._call(self._x)
        return logits

    def __call__(self) -> None:
        """Take the step."""
        self._adam.zero_grad(set_to_none=True)
        loss = F.binary_cross_entropy_with_logits(self.logits().float(), self._labels)
        loss.backward()
        self._adam.step()

    @property
    def standing_bytes(self) -> int:
        """Bytes of parameters, masks and optimizer."""
        state = [part for of_one in self._adam.state.values() for part in of_one.values() if isinstance(part, Tensor)]
        return sum(part.nbytes for part in (*self._module.parameters(), *self._module.buffers(), *state))


def _measure(setting: Setting, arithmetic: str, batch: int) -> dict[str, Any]:
    autocast, precision = ARITHMETICS[arithmetic]
    if setting.is_dry:
        autocast = False  # the interpreter multiplies bfloat16 wrongly
    mlp, x, labels = _problem(setting, batch)
    with_compiled = batch in COMPILED_AT or (setting.is_dry and arithmetic == "bf16")
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    calls: dict[str, Callable[[], object]] = {}
    with float32_precision(precision):
        for name, (step, context) in _steps(setting, mlp, x, labels, autocast, with_compiled).items():
            calls[name] = partial(_within, context, step)
            why = _failure(partial(_check, step, context, mlp, x, autocast, precision))
            if why:
                failed[name] = why
                continue
            peak = setting.stopwatch.peak_bytes(calls[name])
            found[name] = {"peak_bytes": peak + step.standing_bytes, "standing_bytes": step.standing_bytes}
        called = setting.stopwatch.called({name: calls[name] for name in found})
        # A call that no graph can hold still has a time as called.
        whys = {name: _failure(partial(setting.stopwatch.replayed, {name: calls[name]})) for name in found}
        failed |= {f"{name}, as a graph": why for name, why in whys.items() if why}
        replayed = setting.stopwatch.replayed({name: calls[name] for name, why in whys.items() if not why})
    for figure, timings in (("called", called), ("replayed", replayed)):
        for name, timing in timings.items():
            found[name][figure] = timing._asdict()
    return {
        "arithmetic": arithmetic,
        "batch": batch,
        "sparsity": SPARSITY,
        "failed": failed,
        "contestants": found,
        "ratios": ratios(found),
    }


def ratios(calls: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return opponent -> figure -> how many times ours is faster, each as called at its best; and of memory."""
    ours = [facts for name, facts in calls.items() if name in ("ours", "ours compiled")]
    opponents = {name: facts for name, facts in calls.items() if not name.startswith("ours")}
    if not ours:
        return {}
    return {
        name: {
            figure: facts[figure]["median_us"] / min(mine[figure]["median_us"] for mine in ours if figure in mine)
            for figure in ("called", "replayed")
            if figure in facts and any(figure in mine for mine in ours)
        }
        | {"peak_bytes": facts["peak_bytes"] / ours[0]["peak_bytes"]}
        for name, facts in opponents.items()
    }


Context = Callable[[], AbstractContextManager[object]]


def _steps(
    setting: Setting, mlp: MaskedMLP, x: Tensor, labels: Tensor, autocast: bool, with_compiled: bool
) -> dict[str, tuple[Step, Context]]:
    """Make the calls to time, each with its own parameters and the context that it runs in."""
    steps: dict[str, tuple[Step, Context]] = {}

    def add(name: str, module: nn.Module, context: Context = nullcontext, is_compiled: bool = False) -> None:
        call = torch.compile(module, backend=setting.compiler, dynamic=False) if is_compiled else module
        steps[name] = (Step(module, call, x, labels, autocast), context)

    for name, path in PATHS.items():
        add(name, deepcopy(mlp), nullcontext if path is None else partial(masked_linear.forced_path, path))
    add("eager", PlainMaskedMLP(mlp).to(setting.device))
    if with_compiled:
        add("torch.compile", PlainMaskedMLP(mlp).to(setting.device), is_compiled=True)
        add("ours compiled", deepcopy(mlp), is_compiled=True)
    return steps


def _measure_ddp(setting: Setting, arithmetic: str, batch: int) -> dict[str, Any]:
    """Take the step under DistributedDataParallel with one process, to see that it runs and what it costs."""
    autocast = ARITHMETICS[arithmetic][0] and not setting.is_dry
    mlp, x, labels = _problem(setting, batch)
    backend = "gloo" if setting.device.type == "cpu" else "nccl"
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        torch.distributed.init_process_group(backend, init_method=meeting, rank=0, world_size=1)
        try:
            calls: dict[str, Callable[[], object]] = {}
            # Masks do not change: they need not be sent with every forward pass.
            names = inspect.signature(nn.parallel.DistributedDataParallel).parameters
            option = {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
            for name, module in {"ours": mlp, "eager": PlainMaskedMLP(mlp).to(setting.device)}.items():
                spread = nn.parallel.DistributedDataParallel(deepcopy(module), **option)
                calls[name] = Step(module, module, x, labels, autocast)
                calls[f"{name}, DDP"] = Step(spread, spread, x, labels, autocast)
            timings = setting.stopwatch.called(calls)
        finally:
            torch.distributed.destroy_process_group()
    return {
        "arithmetic": arithmetic,
        "batch": batch,
        "contestants": {name: {"called": timing._asdict()} for name, timing in timings.items()},
    }


def _problem(setting: Setting, batch: int) -> tuple[MaskedMLP, Tensor, Tensor]:
    widths = (DRY_NETWORKS if setting.is_dry else NETWORKS)["narrow"]
    mlp = deepcopy(masked_network(widths, "unstructured", SPARSITY)[0]).to(setting.device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, widths[0], generator=generator)
    labels = (torch.rand(batch, len(TASKS), generator=generator) < 0.3).float()
    return mlp, x.to(setting.device), labels.to(setting.device)


def _failure(call: Callable[[], object]) -> str:
    """Call, and return what went wrong, or nothing."""
    try:
        call()
    except FAILURES as error:
        return named(error)
    return ""


def _check(step: Step, context: Context, mlp: MaskedMLP, x: Tensor, autocast: bool, precision: str) -> None:
    """Check a forward pass against float64, and that weights which no task keeps get no gradient."""
    operands = torch.bfloat16 if autocast else None
    # TF32 has the exponent of float32 and the mantissa of float16: rounding the operands adds to its error.
    accumulate = torch.float16 if precision == "high" and not autocast else torch.float32
    with context():
        logits = step.logits().detach()
    for t, task in enumerate(TASKS):
        hidden = [Layer(m.weight.detach() * m.mask(task), m.bias.detach(), "relu") for m in mlp.masked_layers()]
        head = mlp.heads[task]
        assert isinstance(head, nn.Linear)
        layers = [*hidden, Layer(head.weight.detach(), head.bias.detach(), "none")]
        assert_rounding(logits[:, t : t + 1], mlp_reference(x, layers, accumulate, operands))
    _within(context, step)
    weights = [p for name, p in step._module.named_parameters() if name.startswith("layers.") and p.dim() == 2]
    for weight, layer in zip(weights, mlp.masked_layers(), strict=True):
        assert weight.grad is not None
        stray = int((weight.grad[~layer.masks.any(0)] != 0).sum())
        assert stray == 0, f"gradient: got {stray} pruned weights with one, wanted none"


def _within(context: Context, step: Step) -> None:
    with context():
        step()
