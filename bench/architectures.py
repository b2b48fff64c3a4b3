"""Networks that people serve, with random weights: what `bench/networks.py` prunes, freezes and times.

A dense product takes the same time whatever the values. A sparse one does not: where pruning leaves weights decides how
evenly rows share the work. Drawn alike, weights leave every row about as many, which training does not. So the rows and
columns of each linear layer are scaled by log-normal factors (`SPREAD`): of one drawn as torch draws it and pruned to
90%, the fullest tenth of the rows keeps six times what the emptiest does, not one and a half times. The networks of
torch-rechub and transformers are these packages' own classes; the others are written out here in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS = 128  # of a sequence of DistilBERT
SPREAD = 0.05  # standard deviation of the logarithm of the factor of a row or a column
FIELDS, WORDS, DIM = 26, 1000, 16  # of a click log: its fields, the values of each, and the width of an embedding


class Architecture(NamedTuple):
    """A network: how to make it, and what enters it."""

    name: str
    make: Callable[[], nn.Module]  # called with `inputs`, returns one tensor
    inputs: Callable[[int, torch.Generator], tuple[Tensor, ...]]  # batch -> tensors whose first dimension it is
    batches: tuple[int, ...]
    tokens: int = 1  # that a row consists of: rows of what enters a linear layer


def made(architecture: Architecture, seed: int = 0) -> nn.Module:
    """Return the network for inference, its weights unevenly spread over rows and columns.

    BatchNorm1d has seen some rows, so that folding it is no identity.

    Raises:
        ImportError: If the package that it is from is absent.
    """
    torch.manual_seed(seed)
    model = architecture.make()
    _spread(model, torch.Generator().manual_seed(seed))
    if any(isinstance(module, nn.BatchNorm1d) for module in model.modules()):
        with torch.no_grad():
            model.train()(*architecture.inputs(256, torch.Generator().manual_seed(seed)))
    return model.eval().requires_grad_(False)


class DistilBert(nn.Module):
    """DistilBERT's encoder (6 blocks of width 768) as transformers configures it: ids -> hidden states."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        from transformers import DistilBertConfig, DistilBertModel

        self.model = DistilBertModel(DistilBertConfig(**settings))

    def forward(self, ids: Tensor) -> Tensor:
        states: Tensor = self.model(ids).last_hidden_state
        return states


class TransformerBlock(nn.Module):
    """A block of ViT: `x += proj(attention(norm(x)))`, `x += mlp(norm(x))`, in timm's names."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm2(x))


class Dlrm(nn.Module):
    """DLRM: an MLP over the numbers, embeddings of the ids, all dot products between them, and an MLP over these."""

    def __init__(self, dense: int, dim: int, bottom: tuple[int, ...], top: tuple[int, ...]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(FIELDS * WORDS, dim)  # one table, as an EmbeddingBag per field would have
        self.bottom = mlp((dense, *bottom, dim), last_relu=True)
        self.top = mlp((dim + FIELDS * (FIELDS + 1) // 2, *top, 1))
        self.register_buffer("pairs", torch.tril_indices(FIELDS + 1, FIELDS + 1, -1), persistent=False)

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        x = self.bottom(dense)
        vectors = torch.cat([x[:, None], self.embedding(ids)], 1)  # [batch, fields + 1, dim]
        dots = vectors @ vectors.transpose(1, 2)
        return torch.sigmoid(self.top(torch.cat([x, dots[:, self.pairs[0], self.pairs[1]]], 1)))


class OfVectors(nn.Module):
    """A model of torch-rechub on embeddings that were looked up before: `[batch, width]`."""

    def __init__(self, make: Callable[..., nn.Module], width: int, **settings: Any) -> None:
        super().__init__()
        from torch_rechub.basic.features import DenseFeature

        self.model = make([DenseFeature("x", embed_dim=width)], **settings)
        self.model.embedding = LookedUp()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y


class LookedUp(nn.Module):
    """In the place of torch-rechub's embeddings, which make float32 of a vector whatever it is: `x` itself."""

    def forward(self, x: Tensor, features: Any, squeeze_dim: bool) -> Tensor:
        return x


class Esmm(nn.Module):
    """ESMM of torch-rechub, with its look-ups: ids `[batch, FIELDS]`, half of them of the user."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        from torch_rechub.basic.features import SparseFeature
        from torch_rechub.models.multi_task import ESMM

        fields = [SparseFeature(f"field{i}", WORDS, DIM) for i in range(FIELDS)]
        half = FIELDS // 2
        self.model = ESMM(fields[:half], fields[half:], {"dims": list(widths)}, {"dims": list(widths)})

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.model({f"field{i}": ids[:, i] for i in range(FIELDS)})
        return y


class ResidualBlock(nn.Module):
    """`x + narrow(relu(wide(norm(x))))`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm1d(width), nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(0.1), nn.Linear(hidden, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class GatedMlp(nn.Module):
    """The feed-forward part of a Llama block: `down(silu(gate(x)) * up(x))`, without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


@torch.no_grad()
def _spread(model: nn.Module, generator: torch.Generator) -> None:
    """Scale the rows and columns of every linear layer's weight by log-normal factors whose mean square is 1."""
    for weight in {layer.weight: None for layer in model.modules() if isinstance(layer, nn.Linear)}:
        for shape in ((len(weight), 1), (1, weight.shape[1])):
            weight *= (SPREAD * torch.randn(shape, generator=generator) - SPREAD**2).exp()


def mlp(widths: tuple[int, ...], last_relu: bool = False) -> nn.Sequential:
    """Return linear layers of these widths with a ReLU after each but the last, or after that one too."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*(layers if last_relu else layers[:-1]))


def _mmoe() -> nn.Module:
    from torch_rechub.models.multi_task import MMOE

    return OfVectors(MMOE, FIELDS * DIM, task_types=["classification"] * 2, n_expert=8, **_EXPERTS)


def _ple() -> nn.Module:
    from torch_rechub.models.multi_task import PLE

    settings = {"n_level": 2, "n_expert_specific": 2, "n_expert_shared": 2}
    return OfVectors(PLE, FIELDS * DIM, task_types=["classification"] * 2, **settings, **_EXPERTS)


def _deepfm_tower() -> nn.Module:
    from torch_rechub.basic.layers import MLP

    return MLP(FIELDS * DIM, dims=[400, 400, 400], dropout=0.1)


def _resnet(width: int = 512, hidden: int = 1024, blocks: int = 4, inputs: int = 100) -> nn.Module:
    body = [ResidualBlock(width, hidden) for _ in range(blocks)]
    head = nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 1)
    return nn.Sequential(nn.Linear(inputs, width), *body, *head)


def _numbers(*shape: int) -> Callable[[int, torch.Generator], tuple[Tensor, ...]]:
    return lambda batch, generator: (torch.randn(batch, *shape, generator=generator),)


def _ids(words: int, *shape: int) -> Callable[[int, torch.Generator], tuple[Tensor, ...]]:
    return lambda batch, generator: (torch.randint(words, (batch, *shape), generator=generator),)


def _numbers_and_ids(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    ids = torch.randint(WORDS, (batch, FIELDS), generator=generator) + WORDS * torch.arange(FIELDS)
    return torch.randn(batch, 13, generator=generator), ids


_EXPERTS: dict[str, Any] = {"expert_params": {"dims": [256, 128]}, "tower_params_list": [{"dims": [64]}] * 2}
ROWS = (1, 16, 128)
ARCHITECTURES = (
    Architecture("DistilBERT", DistilBert, _ids(30522, TOKENS), (1, 4), TOKENS),  # 16 sequences take seconds each
    Architecture("ViT-B block", lambda: TransformerBlock(768, 12, 3072), _numbers(197, 768), (1, 4), 197),
    Architecture("DLRM", lambda: Dlrm(13, 64, (512, 256), (512, 256)), _numbers_and_ids, ROWS),
    Architecture(
        "DLRM top MLP", lambda: nn.Sequential(*mlp((415, 512, 256, 1)), nn.Sigmoid()), _numbers(415), (*ROWS, 512)
    ),
    Architecture("MMoE", _mmoe, _numbers(FIELDS * DIM), ROWS),
    Architecture("PLE", _ple, _numbers(FIELDS * DIM), ROWS),
    Architecture("ESMM", lambda: Esmm((512, 256, 128)), _ids(WORDS, FIELDS), ROWS),
    Architecture("DeepFM tower", _deepfm_tower, _numbers(FIELDS * DIM), ROWS),
    Architecture("ResNet-MLP", _resnet, _numbers(100), ROWS),
    Architecture("gated MLP", lambda: GatedMlp(4096, 11008), _numbers(4096), (1, 128)),  # a minute each to export
)
# The same code in small, for a run that only shows that everything runs.
SMALL = (
    Architecture(
        "DistilBERT",
        lambda: DistilBert(dim=32, n_heads=2, n_layers=1, hidden_dim=64, vocab_size=50),
        _ids(50, 8),
        (2,),
        8,
    ),
    Architecture("DLRM", lambda: Dlrm(13, 16, (32,), (32, 16)), _numbers_and_ids, (2,)),
)
