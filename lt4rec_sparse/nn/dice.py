"""Dice, the activation of the Deep Interest Network: our module, and those of other libraries, which compute the same.

Every library has a class `Dice` of its own, none of which is imported here: one is recognised by its parts, and by what
its forward computes of drawn numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lt4rec_sparse.nn.copying import copy_of
from lt4rec_sparse.nn.reading import affine_of, computes_as, hook_of, pruned

# Of two computations of Dice together, constants among them: each operation rounds within an ulp of what bounds it.
OPERATIONS = 32
_PARTS = "a BatchNorm1d with running statistics, a parameter alpha, at most a Sigmoid, and nothing else"


class Dice(nn.Module):
    """Dice, an activation that adapts to the data: `y = p x + (1 - p) alpha x` with `p = sigmoid(norm(x))`.

    `norm` is a BatchNorm1d without weight and bias: of the batch in training, by its running statistics in `eval()`,
    where `freeze` and `SparseMLP.from_sequential` fuse it with the linear layer before it. `alpha` is trained, and
    begins at 0.

    Example:
        >>> Dice(3).eval()(torch.tensor([[-8.0, 0.0, 8.0]])).round(decimals=1).abs()
        tensor([[0., 0., 8.]], grad_fn=<AbsBackward0>)

    Args:
        features: Width of `x`, `[batch, features]`; so is `alpha`, `[features]`.
        eps: What is added to the variance.

    Raises:
        ValueError: If there is no feature; on a call, if `x` has another shape.

    Source: Deep Interest Network (arXiv 1706.06978), section 5.3.
    """

    def __init__(self, features: int, eps: float = 1e-8) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features: got {features}, wanted at least 1")
        self.bn = nn.BatchNorm1d(features, eps=eps, affine=False)
        self.alpha = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        """Return `[batch, features]` of `x [batch, features]`."""
        if x.dim() != 2:
            raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [batch, {self.bn.num_features}]")
        p = torch.sigmoid(self.bn(x))
        return (p * x + (1 - p) * self.alpha * x).to(x.dtype)  # which alpha may be wider than


def is_called_so(module: nn.Module) -> bool:
    """Tell whether a module's class has the name Dice."""
    return type(module).__name__ == "Dice"


def obstacle(module: nn.Module) -> str | None:
    """Return why a module that is called Dice is left to torch, or None if `constants_of` says what it computes."""
    if reason := difference(module):
        return reason
    if any(part.is_meta for part in (*module.parameters(), *module.buffers())):
        return "got a Dice on the meta device, wanted one with values"
    if not constants_of(module).isfinite().all():
        return "got a Dice with NaN or infinity in it, wanted finite statistics and alpha"
    return None


def difference(module: nn.Module) -> str | None:
    """Return what is otherwise in a module that is called Dice, whatever its values; None if it computes as ours."""
    children = [child for child in module.children() if child is not None]
    if "forward" in vars(module):
        return "got a Dice with a forward of its own, wanted its class's"
    for part in (module, *children):
        if reason := hook_of(part):
            return reason
    norms = [child for child in children if computes_as(child, nn.BatchNorm1d)]
    others = [child for child in children if not computes_as(child, nn.BatchNorm1d)]
    own = {name for name, part in (*module._parameters.items(), *module._buffers.items()) if part is not None}
    beside = {name for name, value in vars(module).items() if isinstance(value, Tensor)}
    is_pruned = "alpha_orig" in own
    if (
        len(norms) != 1
        or not all(computes_as(child, nn.Sigmoid) for child in others)
        or len(others) > 1
        or own != ({"alpha_orig", "alpha_mask"} if is_pruned else {"alpha"})
        or not beside <= {"alpha"}
        or norms[0].running_mean is None
    ):
        parts = [*sorted(own | beside), *(type(child).__name__ for child in children)]
        return f"got a Dice of {', '.join(parts) or 'no parts'}, wanted {_PARTS}"
    alpha, features = module._parameters["alpha_orig" if is_pruned else "alpha"], norms[0].num_features
    assert isinstance(alpha, Tensor) and isinstance(features, int)
    if alpha.numel() != 1 and alpha.shape != (features,):
        return f"got a Dice with alpha of shape {tuple(alpha.shape)}, wanted ({features},) or one element"
    return _difference_of_result(module)


def constants_of(module: nn.Module) -> Tensor:
    """Return what a Dice computes with in `eval()`, as a `slope`: scale, shift and alpha, float32 `[3, features]`."""
    return torch.stack(_constants(module)).float()


def of_constants(slope: Tensor) -> Dice:
    """Return the Dice that computes with scale, shift and alpha, `[3, features]`: `constants_of` it gives their bits.

    It is in `eval()`, since in training it would compute with the statistics of each batch, and take them over.
    Its norm has a weight and a bias: powers of two where a scale is that of no variance, else 1 or -1; and what the
    rounding of the mean left of the shift.
    """
    scale, shift, alpha = slope.detach().cpu().double()
    module = Dice(len(scale))
    eps = module.bn.eps
    # To the root of a variance well above eps, which float32 has. Its relative error is halved by the root, so that the
    # scale is the one float32 next to it.
    exponent = torch.frexp(scale)[1]
    weight = torch.ldexp(torch.sign(scale), exponent - exponent.clamp(-30, 12))
    is_constant = weight == 0
    root = torch.where(is_constant, 1.0, scale / weight)
    norm = nn.BatchNorm1d(len(scale), eps=eps)
    norm.running_var = (root**-2 - eps).float()
    mean = torch.where(is_constant, 0.0, -shift / scale).float()
    norm.running_mean = torch.where(mean.isfinite(), mean, 0.0)
    norm.weight.data = weight.float()
    norm.bias.data = (shift + norm.running_mean.double() * scale).float()
    module.bn = norm
    module.alpha.data = alpha.float()
    return module.eval()


def _norm_of(module: nn.Module) -> nn.BatchNorm1d:
    return next(child for child in module.children() if isinstance(child, nn.BatchNorm1d))


def _constants(module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale, shift and alpha, float64 `[features]`."""
    norm, alpha = _norm_of(module), pruned(module, "alpha")
    assert alpha is not None
    scale, shift = affine_of(norm, "Dice")
    return scale, shift, alpha.detach().cpu().double().flatten().expand(len(scale))


def _difference_of_result(module: nn.Module) -> str | None:
    """Compare a copy that has drawn statistics and parameters with `z (alpha + (1 - alpha) sigmoid(scale z + shift))`.

    In float64, where all rounding is far below what another formula gives. The values are drawn, so that two that are
    equal by chance (an alpha of 0, a mean of 0) hide nothing, and a module without values can be judged.
    """
    generator = torch.Generator().manual_seed(0)
    copied = copy_of(module).to_empty(device="cpu").double().eval()
    for part in (*copied.parameters(), *copied.buffers()):
        if part.is_floating_point():
            part.data = torch.rand(part.shape, generator=generator, dtype=torch.float64) + 0.25
        else:
            part.data = torch.ones_like(part)
    norm = _norm_of(copied)
    assert norm.running_mean is not None
    features = norm.num_features
    norm.running_mean -= 0.75  # of both signs
    # Rows where the gate is half open, and rows far beyond.
    z = torch.randn(64, features, generator=generator, dtype=torch.float64)
    z *= torch.tensor([0.1, 1.0, 10.0, 1000.0], dtype=torch.float64).repeat(16)[:, None]
    try:
        with torch.no_grad():
            y = copied(z.clone())
    except Exception as error:  # a forward that does not find what it wants raises whatever it likes
        return f"got a Dice that raises a {type(error).__name__} on [batch, {features}], wanted one that computes it"
    scale, shift, alpha = _constants(copied)
    gate = torch.sigmoid(z * scale + shift)
    wanted = z * (alpha + (1 - alpha) * gate)
    # The gate moves by at most a quarter of what its argument does, whose terms are z, mean and bias.
    terms = (z * scale).abs() + (norm.running_mean * scale).abs() + (0 if norm.bias is None else norm.bias.abs())
    bound = OPERATIONS * 2 * 2.0**-53 * z.abs() * (1 + alpha.abs()) * (1 + terms / 4)
    if not isinstance(y, Tensor) or y.shape != z.shape or not ((y - wanted).abs() <= bound).all():
        return "got a Dice that computes otherwise, wanted p x + (1 - p) alpha x with p = sigmoid(norm(x))"
    return None
