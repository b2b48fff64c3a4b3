"""The ranking models: inputs, and a network that computes every task's logit from them.

Weights of the network for two tasks, 1000 inputs and hidden layers 512-256-128, in millions: hard sharing, ESMM 1.35,
shared bottom 0.71, MMoE 1.20, PLE 1.46, AITM 1.42.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lt4rec_sparse.nn import MaskedMLP
from lt4rec_sparse.nn.masked import check_tasks, task_index
from lt4rec_sparse.ranker.features import EncodedFeatures
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.recsys.models.inputs import TaskInputs

Inputs = CrossedEmbeddings | TaskInputs

MMOE_EXPERTS = 4
# Per level of PLE: experts that belong to each task, and shared ones.
PLE_LEVELS, PLE_TASK_EXPERTS, PLE_SHARED_EXPERTS = 2, 1, 2


class MultiTask(nn.Module, ABC):
    """A model of several tasks over one input, or over one view of it per task.

    A model defines `logits(x, tasks)`. If every task sees the same `x`, it runs once. If each sees its own, task t's
    logit is `logits(x_t, (t,))`: then the layers that tasks share run once per task. `hidden` are widths of a task's
    hidden layers, from the input on; each model says what it makes of them.

    Raises:
        ValueError: If there is no task, or a task is repeated.
    """

    inputs: Any  # CrossedEmbeddings, which can be served, or TaskInputs

    def __init__(self, inputs: Inputs, tasks: Sequence[str]) -> None:
        super().__init__()
        self.inputs = inputs
        self.tasks = check_tasks(tasks)

    def forward(self, features: EncodedFeatures, task: str | None = None) -> Tensor:
        """Return logits: `[batch, 1]` for one task, or `[batch, tasks]`.

        Raises:
            ValueError: If there is no such task.
        """
        names = self.tasks if task is None else (self.tasks[task_index(self.tasks, task)],)
        if isinstance(self.inputs, TaskInputs):
            views, terms = self.inputs(features, self.reads(names))
        else:
            views, terms = dict.fromkeys(self.reads(names), self.inputs(features)), {}
        logits = self.score(views, names)
        return logits + torch.cat([terms[name] for name in names], dim=1) if terms else logits

    def reads(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
        """Return the tasks whose views are needed to score `tasks`."""
        return tasks

    def score(self, views: Mapping[str, Tensor], tasks: tuple[str, ...]) -> Tensor:
        """Return the network's logits `[batch, len(tasks)]` if each task sees its own view."""
        first, *others = (views[task] for task in tasks)
        if all(view is first for view in others):
            return self.logits(first, tasks)
        return torch.cat([self.logits(views[task], (task,)) for task in tasks], dim=1)

    @abstractmethod
    def logits(self, x: Tensor, tasks: tuple[str, ...]) -> Tensor:
        """Return the network's logits `[batch, len(tasks)]` if the tasks see the same `x [batch, in_features]`.

        `tasks` are all of the model's tasks in order, or one.
        """

    @abstractmethod
    def head(self, task: str) -> nn.Linear:
        """Return the layer that gives a task's logit."""

    @torch.no_grad()
    def start_at(self, rates: Mapping[str, float]) -> None:
        """Set the bias of each task's head to `logit(rate) = log(rate / (1 - rate))`, task -> rate in (0, 1).

        Before it is trained, the model then scores every row near its task's rate; without, near one half.
        """
        for task, rate in rates.items():
            self.head(task).bias.fill_(math.log(rate / (1 - rate)))


class SparseSharing(MultiTask):
    """One embedding, one cross and one MLP for all tasks; each task sees the MLP through its own mask.

    With one task and a full mask this is the paper's single-task baseline of the same size.

    Source: LT4REC (arXiv 2008.09872), Figure 3 (S-Weight) and Figure 1 (single task).
    """

    def __init__(self, inputs: Inputs, tasks: Sequence[str], hidden: Sequence[int]) -> None:
        super().__init__(inputs, tasks)
        self.mlp = MaskedMLP(inputs.out_features, hidden, tasks=self.tasks)

    def logits(self, x: Tensor, tasks: tuple[str, ...]) -> Tensor:
        logits: Tensor = self.mlp(x, tasks[0] if len(tasks) == 1 else None)
        return logits

    def head(self, task: str) -> nn.Linear:
        return cast(nn.Linear, self.mlp.heads[task])


class HardSharing(MultiTask):
    """Embedding and cross are shared; each task has its own MLP.

    Source: LT4REC (arXiv 2008.09872), Figure 2.
    """

    def __init__(self, inputs: Inputs, tasks: Sequence[str], hidden: Sequence[int]) -> None:
        super().__init__(inputs, tasks)
        self.mlps = nn.ModuleDict({task: MaskedMLP(inputs.out_features, hidden, tasks=(task,)) for task in self.tasks})

    def logits(self, x: Tensor, tasks: tuple[str, ...]) -> Tensor:
        return torch.cat([self.mlps[task](x, task) for task in tasks], dim=1)

    def head(self, task: str) -> nn.Linear:
        return cast(nn.Linear, cast(MaskedMLP, self.mlps[task]).heads[task])


class MLP(nn.Module):
    """Layers of `h = relu(h @ weight.T + bias)`, and optionally a linear head; initialised as by torch.

    It has the experts and towers of models that are not pruned.
    """

    def __init__(self, in_features: int, hidden: Sequence[int], head: int = 0) -> None:
        super().__init__()
        widths = (in_features, *hidden)
        self.layers = nn.ModuleList(nn.Linear(k, n) for k, n in zip(widths[:-1], widths[1:], strict=True))
        self.head = nn.Linear(widths[-1], head) if head else None

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out_features]` for `x [..., in_features]`."""
        for layer in self.layers:
            x = layer(x).relu()
        return x if self.head is None else self.head(x)


class Gate(nn.Module):
    """`y = sum over i of softmax(x @ weight.T)_i expert_i`, row by row.

    Source: Ma et al., MMoE (KDD 2018, doi 10.1145/3219819.3220007), section 4.2.
    """

    def __init__(self, in_features: int, experts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, experts, bias=False)

    def forward(self, x: Tensor, experts: Sequence[Tensor]) -> Tensor:
        """Mix the experts' outputs, `[batch, width]` each, by `x [batch, in_features]`."""
        share = self.linear(x).softmax(1).unsqueeze(1)  # [batch, 1, experts]
        return torch.bmm(share, torch.stack(list(experts), dim=1)).squeeze(1)


class ESMM(MultiTask):
    """`logit_t = tower_t(x)`: pCTR for the first task, and pCVR given a click for each later one.

    ESMM is defined by its objective: the loss of pCTR for the first task and `losses.entire_space` of `pCTR pCVR` for
    each later one, both over all impressions. A pCVR is never trained on clicked rows alone, and is served as it is.

    Source: Ma et al. (arXiv 1804.07931), section 2.2 and Figure 2.
    """

    def __init__(self, inputs: Inputs, tasks: Sequence[str], hidden: Sequence[int]) -> None:
        super().__init__(inputs, tasks)
        self.towers = _towers(inputs.out_features, hidden, self.tasks)

    def logits(self, x: Tensor, tasks: tuple[str, ...]) -> Tensor:
        return torch.cat([self.towers[task](x) for task in tasks], dim=1)

    def head(self, task: str) -> nn.Linear:
        return _head(self.towers, task)


class SharedBottom(MultiTask):
    """`logit_t = tower_t(bottom(x))`: all layers but the last are shared.

    Source: Caruana, "Multitask learning" (Machine Learning 28, 1997); the baseline of MMoE (KDD 2018), Figure 1a.
    """

    def __init__(self, inputs: Inputs, tasks: Sequence[str], hidden: Sequence[int]) -> None:
        super().__init__(inputs, tasks)
        lower, upper = _lower_and_upper(hidden)
        self.bottom = MLP(inputs.out_features, lower)
        self.towers = _towers(lower[-1], upper, self.tasks)

    def logits(self, x: Tensor, tasks: tuple[str, ...]) -> Tensor:
        h = self.bottom(x)
        return torch.cat([self.towers[task](h) for task in tasks], dim=1)

    def head(self, task: str) -> nn.Linear:
        return _head(self.towers, task)


class MMoE(MultiTask):
    """`logit_t = tower_t(sum over i of g_t(x)_i f_i(x))`, `g_t(x) = softmax(x @ gate_t.T)`.

    Four experts `f` have half of all `hidden` but the last; a tower has the last.

    Source: Ma et al. (KDD 2018, doi 10.1145/3219819.3220007), section 4.2.
    """

    def __init__(self, inputs: Inputs, tasks: Sequence[str], hidden: Sequence[int]) -> None:
        super().__init__(inputs, tasks)
        lower, upper = _lower_and_upper(hidden)
        expert, width = _half(lower), inputs.out_features
        self.experts = nn.ModuleList(MLP(width, expert) for _ in range(MMOE_EXPERTS))
        self.gates = nn.ModuleDict({task: Gate(width, MMOE_EXPERTS) for task in self.tasks})
        self.towers = _towers(expert[-1], upper, self.tasks)

    def logits(self, x: Tensor, tasks: tuple[str, ...]) -> Tensor:
        outputs = [expert(x) for expert in self.experts]
        return torch.cat([self.towers[task](self.gates[task](x, outputs)) for task in tasks], dim=1)

    def head(self, task: str) -> nn.Linear:
        return _head(self.towers, task)


class Extraction(nn.Module):
    """One level of PLE: task t's gate mixes its own experts of `x_t` and the shared ones of `x_shared`.

    Below the last level a further gate, over `x_shared`, mixes all experts of all tasks: the next level's `x_shared`.

    Source: Tang et al. (RecSys 2020, doi 10.1145/3383313.3412236), sections 4.1 (CGC) and 4.2.
    """

    def __init__(self, in_features: int, expert: Sequence[int], tasks: Sequence[str], last: bool) -> None:
        super().__init__()
        own, shared = PLE_TASK_EXPERTS, PLE_SHARED_EXPERTS
        self.own = nn.ModuleDict({task: nn.ModuleList(MLP(in_features, expert) for _ in range(own)) for task in tasks})
        self.shared = nn.ModuleList(MLP(in_features, expert) for _ in range(shared))
        self.gates = nn.ModuleDict({task: Gate(in_features, own + shared) for task in tasks})
        self.shared_gate = None if last else Gate(in_features, own * len(tasks) + shared)

    def forward(self, x: Mapping[str, Tensor], x_shared: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Mix the experts for each task of `x`: every task; at the last level some may be left out.

        Vectors are `[batch, in_features]`, the results `[batch, expert width]`; the last level returns `x_shared`.
        """
        shared = [expert(x_shared) for expert in self.shared]
        experts: Any = self.own
        own = {task: [expert(x_t) for expert in experts[task]] for task, x_t in x.items()}
        mixed = {task: self.gates[task](x_t, [*own[task], *shared]) for task, x_t in x.items()}
        if self.shared_gate is None:
            return mixed, x_shared
        everything = [output for outputs in own.values() for output in outputs] + shared
        return mixed, self.shared_gate(x_shared, everything)


class PLE(MultiTask):
    """`logit_t = tower_t(x_t)` of the last of two levels, `(x_t, x_shared) = level(x_t, x_shared)` from `x` on.

    At the last level a task's own expert learns from that task alone; below it, through the shared gate, from all.
    Widths are those of `MMoE`; a level has an expert per task and two shared ones.

    Source: Tang et al. (RecSys 2020, doi 10.1145/3383313.3412236).
    """

    def __init__(self, inputs: Inputs, tasks: Sequence[str], hidden: Sequence[int]) -> None:
        super().__init__(inputs, tasks)
        lower, upper = _lower_and_upper(hidden)
        expert = _half(lower)
        widths = (inputs.out_features, *(expert[-1] for _ in range(PLE_LEVELS - 1)))
        self.levels = nn.ModuleList(
            Extraction(width, expert, self.tasks, last=i == PLE_LEVELS - 1) for i, width in enumerate(widths)
        )
        self.towers = _towers(expert[-1], upper, self.tasks)

    def logits(self, x: Tensor, tasks: tuple[str, ...]) -> Tensor:
        of_task, shared = dict.fromkeys(self.tasks, x), x
        for level in self.levels:
            last = level is self.levels[-1]
            of_task, shared = level({task: of_task[task] for task in (tasks if last else self.tasks)}, shared)
        return torch.cat([self.towers[task](of_task[task]) for task in tasks], dim=1)

    def head(self, task: str) -> nn.Linear:
        return _head(self.towers, task)


class Transfer(nn.Module):
    """Attend to two vectors: `z = sum over u of w_u value(u)`, `w = softmax over u of query(u) . key(u) / sqrt(k)`.

    `u` is `p`, the vector handed on by the earlier task, and `q`, the task's own, each of width `k`.

    Source: Xi et al., AITM (arXiv 2105.08489), the adaptive information transfer module.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)

    def forward(self, p: Tensor, q: Tensor) -> Tensor:
        """Return `z [batch, width]` of `p` and `q`, `[batch, width]` each."""
        u = torch.stack([p, q], dim=1)  # [batch, 2, width]
        weight = ((self.query(u) * self.key(u)).sum(2) / u.shape[2] ** 0.5).softmax(1)  # [batch, 2]
        return torch.bmm(weight.unsqueeze(1), self.value(u)).squeeze(1)


class AITM(MultiTask):
    """`logit_t = head_t(z_t)`, `z_1 = tower_1(x)`, `z_t = transfer_t(handed_{t-1}(z_{t-1}), tower_t(x))`.

    Tasks are in the order in which users reach them: impression, click, purchase. A later task's loss trains the towers
    before it, an earlier task's loss never those after it. In the paper each probability is end to end, over all
    impressions; trained on clicked rows only, a later probability is conditional on the click.

    Source: Xi et al. (arXiv 2105.08489).
    """

    def __init__(self, inputs: Inputs, tasks: Sequence[str], hidden: Sequence[int]) -> None:
        super().__init__(inputs, tasks)
        width = hidden[-1]
        self.towers = nn.ModuleDict({task: MLP(inputs.out_features, hidden) for task in self.tasks})
        self.handed = nn.ModuleDict({task: MLP(width, (width,)) for task in self.tasks[:-1]})
        self.transfers = nn.ModuleDict({task: Transfer(width) for task in self.tasks[1:]})
        self.heads = nn.ModuleDict({task: nn.Linear(width, 1) for task in self.tasks})

    def reads(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
        """Return every task up to the last of `tasks`: its tower needs theirs."""
        return self.tasks[: self.tasks.index(tasks[-1]) + 1]

    def score(self, views: Mapping[str, Tensor], tasks: tuple[str, ...]) -> Tensor:
        """Run the towers in order, each on its own view: `[batch, len(tasks)]`."""
        logits = {}
        before, z = "", torch.empty(0)
        for task in self.reads(tasks):
            q = self.towers[task](views[task])
            z = self.transfers[task](self.handed[before](z), q) if before else q
            logits[task] = self.heads[task](z)
            before = task
        return torch.cat([logits[task] for task in tasks], dim=1)

    def logits(self, x: Tensor, tasks: tuple[str, ...]) -> Tensor:
        return self.score(dict.fromkeys(self.tasks, x), tasks)

    def head(self, task: str) -> nn.Linear:
        return cast(nn.Linear, self.heads[task])


CLASSES: dict[str, Any] = {
    "single_task": SparseSharing,
    "hard_sharing": HardSharing,
    "sparse_sharing": SparseSharing,
    "shared_bottom": SharedBottom,
    "mmoe": MMoE,
    "ple": PLE,
    "esmm": ESMM,
    "aitm": AITM,
}


def _towers(in_features: int, hidden: Sequence[int], tasks: Iterable[str]) -> nn.ModuleDict:
    return nn.ModuleDict({task: MLP(in_features, hidden, head=1) for task in tasks})


def _head(towers: nn.ModuleDict, task: str) -> nn.Linear:
    return cast(nn.Linear, cast(MLP, towers[task]).head)


def _lower_and_upper(hidden: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split widths: all but the last, which tasks may share, and the last, a task's tower; a single one is shared."""
    cut = max(1, len(hidden) - 1)
    return tuple(hidden[:cut]), tuple(hidden[cut:])


def _half(widths: Sequence[int]) -> tuple[int, ...]:
    """Return half of every width: four experts of these widths cost about as much as two MLPs."""
    return tuple(max(1, width // 2) for width in widths)
