"""Plain torch models that somebody pruned, as tests of what becomes of them need them."""

import copy

import torch
from torch import nn
from torch.nn.utils import prune


def pruned(k: int, n: int, amount: float = 0.8, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    linear = nn.Linear(k, n)
    prune.random_unstructured(linear, "weight", amount)
    prune.remove(linear, "weight")
    return linear


def in_blocks(k: int, n: int, seed: int = 0) -> nn.Linear:
    linear = pruned(k, n, 0.0, seed)
    with torch.no_grad():
        kept = torch.rand(n // 16, k // 4, generator=torch.Generator().manual_seed(1 + seed)) < 0.3
        linear.weight *= kept.repeat_interleave(16, 0).repeat_interleave(4, 1)
    return linear


def assert_serves(model: nn.Module, frozen: nn.Module, x: torch.Tensor) -> None:
    """Fail unless the frozen model computes what the model does in `eval()`, in a copy that has no gradient."""
    wanted = copy.deepcopy(model).eval()(x).detach()
    y = frozen(x)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen.training


class Residual(nn.Module):
    """A block as vision and language models have them: two layers, an activation, a norm, and a sum."""

    def __init__(self, width: int, amount: float = 0.8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide, self.narrow = pruned(width, 2 * width, amount, 1), pruned(2 * width, width, amount, 2)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.narrow(nn.functional.gelu(self.wide(self.norm(x))))
