"""What a module computes with: a forward of its own, hooks, what `torch.nn.utils.prune` makes of its parameters."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod


def computes_as(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Tell whether a module computes as one of some classes does, and not by a forward of its own."""
    if "forward" in vars(module):
        return False
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def pruned(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter as the next forward pass reads it.

    It is the attribute of that name but where `torch.nn.utils.prune` is at work: it computes the attribute before each
    forward pass, so that after a step of an optimiser it is that of the step before.
    """
    original = module._parameters.get(f"{name}_orig")
    if original is None:
        value: Tensor | None = getattr(module, name)
        return value
    return original * module.get_buffer(f"{name}_mask").to(original)


def hook_of(module: nn.Module) -> str | None:
    """Return what is said of a forward hook that nothing would call: any but those of `torch.nn.utils.prune`."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    others = [hook for hook in hooks if not isinstance(hook, BasePruningMethod)]
    return f"got a hook, {type(others[0]).__name__}, wanted none: nothing would call it" if others else None


def affine_of(norm: nn.BatchNorm1d, name: str) -> tuple[Tensor, Tensor]:
    """Return scale and shift, float64 `[features]`, with which a BatchNorm1d computes at inference."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"{name}: got a BatchNorm1d without running statistics, wanted them: it needs the batch's own")
    mean, variance = norm.running_mean.detach().cpu().double(), norm.running_var.detach().cpu().double()
    scale = (variance + norm.eps).rsqrt()
    shift = -mean * scale
    if norm.weight is not None:
        weight, bias = (pruned(norm, part) for part in ("weight", "bias"))
        assert weight is not None and bias is not None
        weight, bias = weight.detach().cpu().double(), bias.detach().cpu().double()
        scale, shift = scale * weight, shift * weight + bias
    return scale, shift
