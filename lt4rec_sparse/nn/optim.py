"""Adam for sparse sharing: a step for one task moves only what that task owns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lt4rec_sparse.nn.compressed import CompressedLinear
from lt4rec_sparse.nn.masked import MaskedLinear

MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch names them


class _Part(NamedTuple):
    """Weights of one layer that the same tasks own and that took the same number of steps."""

    layer: MaskedLinear
    owners: frozenset[str]
    places: Tensor  # int64 [n], into the flattened weight
    values: nn.Parameter  # [n], what Adam steps; the weight itself between two steps


class _Rows(NamedTuple):
    """Rows of one parameter that its sparse gradient names."""

    places: Tensor  # int64 [n]
    rows: nn.Parameter  # [n, dim], what Adam steps


class _Moments(NamedTuple):
    """What Adam remembers of each of a layer's weights, flattened: zeros where it remembers nothing."""

    steps: Tensor  # int64
    exp_avg: Tensor  # dtype of the weight
    exp_avg_sq: Tensor  # dtype of the weight


class MaskedAdam:
    """Adam whose step for a task leaves every weight outside that task's mask bit for bit untouched.

    A plain Adam moves a weight whose gradient is zero, by its momentum and by weight decay: a step for one task would
    move what only another task owns. Here each masked weight has its own count of steps: only steps for tasks that own
    it change it, its momentum, its decay and its bias correction. Parameters that are not masked (embeddings, biases,
    heads) take the plain step; parameters without gradient take none.

    A parameter `[rows, dim]` with a sparse gradient, as of `torch.nn.Embedding(sparse=True)`, takes a lazy step: each
    row that the gradient names takes Adam's step, with the sum of its entries and the parameter's count of steps, and
    no other row changes a bit. Where every row is named that is the plain step. A row that is not named keeps its
    momentum as it is, and has no decay, then or later. A parameter may take steps of both kinds.

    Weights that the same tasks own and that took the same number of steps are gathered into one vector, stepped by
    torch's Adam, and put back; momentum is stored for kept weights only. If a layer has one task and all its weights
    took the same number of steps, the plain step does the same in a third of the time: without gradient, momentum and
    decay it subtracts zero.

    The parts of a `CompressedLinear` step as they are, each by steps for its owners alone. A state is the same for both
    kinds of layers: one of a `MaskedMLP` can be loaded for its `CompressedMLP`, and the other way round, to the bit, if
    weights that the same tasks own took the same number of steps.

    Masks may change while the model trains, if `remask` follows. A weight keeps its momentum and its count of steps as
    long as any task owns it, whichever task that is. A weight that no task owns any more is forgotten; a weight that no
    task owned before begins at step 0, without momentum.

    Args:
        model: The model; its `MaskedLinear` layers' weights are stepped through their present masks.
        learning_rate, betas, eps: As in `torch.optim.Adam`.
        weight_decay: As in `torch.optim.Adam`: an L2 term in the gradient; of a lazy step, in that of the named rows.

    Raises:
        ValueError: If a masked weight is not a parameter but computed, by a parametrisation or `torch.nn.utils.prune`,
            or two masked layers share one.

    Source: LT4REC (arXiv 2008.09872), Algorithm 1, lines 12 to 17; Adam (arXiv 1412.6980); the lazy step is that of
    `torch.optim.SparseAdam`, but for `eps`, which is added to the corrected root as in Adam.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self._masked = [module for module in model.modules() if isinstance(module, MaskedLinear)]
        self._sparse = [m for m in model.modules() if isinstance(m, MaskedLinear | CompressedLinear)]
        self._check_weights()
        self._adam = torch.optim.Adam(model.parameters(), learning_rate, betas, eps, weight_decay, fused=True)
        masked = {id(layer.weight) for layer in self._masked}
        self._owners = {
            part: owners
            for layer in self._sparse
            if isinstance(layer, CompressedLinear)
            for part, owners in zip(layer.parts, layer.owners, strict=True)
        }
        self._free = [p for p in model.parameters() if id(p) not in masked and p not in self._owners]
        self._gather([_nothing(layer) for layer in self._masked])

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self._adam.zero_grad(set_to_none=True)
        for layer in self._masked:
            layer.weight.grad = None

    @torch.no_grad()
    def step(self, *tasks: str) -> None:
        """Move what any of `tasks` owns, by the gradients of their losses; with no name, what any task owns.

        Raises:
            ValueError: If no masked layer knows a task, or a sparse gradient does not name whole rows.
            RuntimeError: If a mask changed since the optimiser last looked at them.
        """
        for task in tasks:
            if self._sparse and not any(task in layer.tasks for layer in self._sparse):
                known = sorted({name for layer in self._sparse for name in layer.tasks})
                raise ValueError(f"task: got {task!r}, wanted one of {', '.join(known)}, the masked layers' tasks")
        self._check_masks()
        (group,) = self._adam.param_groups
        parts = [part for part in self._parts if not tasks or not part.owners.isdisjoint(tasks)]
        moved = [part for part in parts if part.layer.weight.grad is not None]
        for layer, _, places, values in moved:
            assert layer.weight.grad is not None
            torch.index_select(layer.weight.view(-1), 0, places, out=values.data)
            values.grad = layer.weight.grad.reshape(-1).index_select(0, places)
        lazy = {p: self._named_rows(p) for p in self._free if p.grad is not None and p.grad.is_sparse}
        parameters = group["params"]
        others = {part for part, owners in self._owners.items() if tasks and owners.isdisjoint(tasks)}
        if lazy or others:
            left = [p for p in parameters if p not in lazy and p not in others]
            group["params"] = left + [named.rows for named in lazy.values()]
        self._adam.step()
        group["params"] = parameters
        for parameter, named in lazy.items():
            moments = self._adam.state.pop(named.rows)
            parameter.index_copy_(0, named.places, named.rows)
            for name in MOMENTS:
                self._adam.state[parameter][name].index_copy_(0, named.places, moments[name])
        for layer, _, places, values in moved:
            layer.weight.view(-1).index_copy_(0, places, values)
            values.grad = None

    def remask(self) -> None:
        """Adopt the present masks; the class says what happens to momentum and counts of steps.

        The weights themselves are left alone: set those that a mask newly keeps to their initial values. A step takes
        longer with more different counts of steps among the weights.
        """
        self._check_weights()
        self._gather(self._moments())

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: weight by weight, so that it does not depend on the history of masks."""
        (group,) = self._adam.param_groups
        return {
            "settings": {name: value for name, value in group.items() if name != "params"},
            "free": [dict(self._adam.state.get(parameter, {})) for parameter in self._free],
            "masked": [moments._asdict() for moments in self._moments_of_all()],
        }

    def state_of(self, parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, tuple[Tensor, ...]]:
        """Return the moments of parameters that step as they are; none before their first step."""
        states = {parameter: self._adam.state.get(parameter, {}) for parameter in parameters}
        return {p: tuple(state[name] for name in MOMENTS if name in state) for p, state in states.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of a checkpoint of the same model, whose masks the model already has.

        Load the model's state first. The masks may differ from those that this optimiser was made with.

        Raises:
            ValueError: If the state has other parameters, or steps of weights that no mask keeps now.
        """
        wanted = [[_size(layer)] for layer in self._sparse]
        got = [list(moments["steps"].shape) for moments in state["masked"]]
        if got != wanted or len(state["free"]) != len(self._free):
            raise ValueError(
                f"state: got {len(state['free'])} parameters and masked weights {got}, "
                f"wanted {len(self._free)} and {wanted}"
            )
        moments = [
            _Moments(**{name: value.to(_device(layer)) for name, value in of_layer.items()})
            for layer, of_layer in zip(self._sparse, state["masked"], strict=True)
        ]
        of_parts: dict[nn.Parameter, dict[str, Tensor]] = {}
        for layer, of_layer in zip(self._sparse, moments, strict=True):
            if bool(of_layer.steps[~_union(layer)].any()):
                raise ValueError("state: got steps of weights that no mask keeps, wanted the model loaded first")
            if isinstance(layer, CompressedLinear):
                of_parts.update(_state_of_parts(layer, of_layer))
        self._adam.param_groups[0].update(state["settings"])
        for parameter, of_parameter in zip(self._free, state["free"], strict=True):
            # Copies, since the state may be that of a living optimiser.
            self._adam.state[parameter] = {n: t.to(parameter.device, copy=True) for n, t in of_parameter.items()}
        for part in self._owners:
            self._adam.state[part] = of_parts.get(part, {})
        self._gather([m for layer, m in zip(self._sparse, moments, strict=True) if isinstance(layer, MaskedLinear)])

    @torch.no_grad()
    def _moments(self) -> list[_Moments]:
        result = []
        for layer in self._masked:
            moments = _nothing(layer)
            held: list[tuple[Tensor, Tensor, Tensor | slice]]  # places, what Adam steps, their positions in it
            held = [(part.places, part.values, slice(None)) for part in self._parts if part.layer is layer]
            if layer in self._whole:
                held = [(self._whole[layer], layer.weight, self._whole[layer])]
            for places, values, inside in held:
                state = self._adam.state.get(values)
                if state:
                    moments.steps[places] = int(state["step"].item())
                    moments.exp_avg[places] = state["exp_avg"].flatten()[inside]
                    moments.exp_avg_sq[places] = state["exp_avg_sq"].flatten()[inside]
            result.append(moments)
        return result

    @torch.no_grad()
    def _moments_of_all(self) -> list[_Moments]:
        of_masked = iter(self._moments())
        return [next(of_masked) if isinstance(m, MaskedLinear) else self._moments_of_parts(m) for m in self._sparse]

    def _moments_of_parts(self, layer: CompressedLinear) -> _Moments:
        moments = _Moments(*(torch.zeros(_size(layer), dtype=dtype) for dtype in (torch.int64, *[torch.float32] * 2)))
        for part, places in zip(layer.parts, layer.places(), strict=True):
            state = self._adam.state.get(part)
            if state:
                is_inside = places >= 0
                moments.steps[places[is_inside]] = int(state["step"].item())
                for name in MOMENTS:
                    getattr(moments, name)[places[is_inside]] = state[name].flatten()[is_inside]
        return moments

    def _named_rows(self, parameter: nn.Parameter) -> _Rows:
        """Return the rows that a parameter's sparse gradient names, with their moments in the optimiser's state."""
        assert parameter.grad is not None
        gradient = parameter.grad.coalesce()  # entries of one row are summed
        if gradient.sparse_dim() != 1:
            raise ValueError(f"gradient: got sparse_dim {gradient.sparse_dim()}, wanted 1, which names whole rows")
        places, state = gradient.indices()[0], self._adam.state[parameter]
        if not state:  # as torch makes it with the first step
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state.update({name: torch.zeros_like(parameter) for name in MOMENTS})
        rows = nn.Parameter(parameter.detach().index_select(0, places))
        rows.grad = gradient.values()
        # The count of steps is the parameter's own tensor, which the step then advances.
        moments = {name: state[name].index_select(0, places) for name in MOMENTS}
        self._adam.state[rows] = {"step": state["step"], **moments}
        return _Rows(places, rows)

    def _gather(self, moments: list[_Moments]) -> None:
        """Form the parts again, from the present masks and each weight's count of steps."""
        free = [(p, state) for p in (*self._free, *self._owners) if (state := self._adam.state.get(p))]
        self._adam.state.clear()
        self._adam.state.update(free)
        self._parts: list[_Part] = []
        self._whole: dict[MaskedLinear, Tensor] = {}  # layer that takes the plain step -> places that tasks own
        for layer, of_layer in zip(self._masked, moments, strict=True):
            owned = layer.masks.flatten(1).any(0).nonzero().squeeze(1)
            steps = of_layer.steps[owned]
            # A layer that every task keeps whole has nothing to protect.
            is_plain = bool(layer.masks.all()) or (
                len(layer.tasks) == 1 and not self._adam.param_groups[0]["weight_decay"]
            )
            if is_plain and bool((steps == steps[:1]).all()):
                self._whole[layer] = owned
                everywhere = _nothing(layer)
                for filled, known in zip(everywhere, of_layer, strict=True):
                    filled[owned] = known[owned]
                everywhere.steps.fill_(int(steps[:1].sum()))
                self._remember(layer.weight, everywhere, slice(None))
                continue
            for part in _parts(layer, of_layer.steps):
                self._parts.append(part)
                self._remember(part.values, of_layer, part.places)
        whole = [layer.weight for layer in self._whole]
        self._adam.param_groups[0]["params"] = [
            *self._free,
            *self._owners,
            *whole,
            *(part.values for part in self._parts),
        ]
        # Also for layers that are whole now: if pruned later, they would otherwise be stepped past the new mask.
        self._masks = [layer.masks.clone() for layer in self._masked]
        self._versions = _versions(self._masked)

    def _remember(self, values: Tensor, moments: _Moments, places: Tensor | slice) -> None:
        steps = int(moments.steps[places][:1].sum())  # the same everywhere; 0 if there is no weight
        if steps:  # otherwise torch makes the state with the first step
            self._adam.state[values] = {
                "step": torch.tensor(float(steps), dtype=torch.float32, device=values.device),
                "exp_avg": moments.exp_avg[places].clone().view_as(values),
                "exp_avg_sq": moments.exp_avg_sq[places].clone().view_as(values),
            }

    def _check_weights(self) -> None:
        for i, layer in enumerate(self._masked):
            if layer._parameters.get("weight") is None:
                raise ValueError(
                    f"masked layer {i}: got a computed weight, wanted a parameter: first call prune.remove, "
                    "which keeps what torch.nn.utils.prune pruned, or parametrize.remove_parametrizations"
                )

        weights = [id(layer.weight) for layer in self._masked]
        if len(set(weights)) < len(weights):
            second = next(i for i, one in enumerate(weights) if one in weights[:i])
            first = weights.index(weights[second])
            raise ValueError(
                f"masked layers {first} and {second}: got one weight for both, wanted one each, or one layer called "
                "in both places: a weight is stepped through the masks of its layer"
            )

    def _check_masks(self) -> None:
        self._check_weights()
        versions = _versions(self._masked)
        if versions == self._versions:
            return
        # They were written since, perhaps with equal values, as when a checkpoint is loaded.
        if not all(torch.equal(layer.masks, mask) for layer, mask in zip(self._masked, self._masks, strict=True)):
            raise RuntimeError("masks: they changed since the last remask(), wanted remask() after every change")
        self._versions = versions


def _size(layer: MaskedLinear | CompressedLinear) -> int:
    return layer.out_features * layer.in_features


def _device(layer: MaskedLinear | CompressedLinear) -> torch.device:
    return layer.weight.device if isinstance(layer, MaskedLinear) else layer.bias.device


def _union(layer: MaskedLinear | CompressedLinear) -> Tensor:
    """Return which weights any task keeps, bool, flattened."""
    masks = layer.masks if isinstance(layer, MaskedLinear) else torch.stack([layer.mask(t) for t in layer.tasks])
    return masks.flatten(1).any(0)


def _state_of_parts(layer: CompressedLinear, moments: _Moments) -> dict[nn.Parameter, dict[str, Tensor]]:
    """Return what Adam remembers of each part.

    Raises:
        ValueError: If weights of one part took different numbers of steps.
    """
    found = {}
    for part, places in zip(layer.parts, layer.places(), strict=True):
        is_inside = places >= 0
        steps = moments.steps[places[is_inside]]
        if bool((steps != steps[:1]).any()):
            low, high = int(steps.min()), int(steps.max())
            raise ValueError(f"state: got {low} to {high} steps of weights with the same owners, wanted one number")
        if int(steps[:1].sum()):
            state = {"step": steps[0].float()}
            for name in MOMENTS:
                spread = part.new_zeros(len(places))
                spread[is_inside] = getattr(moments, name)[places[is_inside]]
                state[name] = spread.view_as(part)
            found[part] = state
    return found


def _versions(layers: list[MaskedLinear]) -> list[int]:
    return [layer.masks._version for layer in layers]


def _nothing(layer: MaskedLinear) -> _Moments:
    flat = layer.weight.detach().view(-1)
    return _Moments(torch.zeros_like(flat, dtype=torch.int64), torch.zeros_like(flat), torch.zeros_like(flat))


def _parts(layer: MaskedLinear, steps: Tensor) -> list[_Part]:
    # Split by task and by count: on a CPU about ten times faster than sorting the owners of every weight.
    by_owners = [(frozenset[str](), torch.arange(steps.numel(), device=steps.device))]
    for task, kept in zip(layer.tasks, layer.masks.flatten(1), strict=True):
        halves = [(names, places, kept[places]) for names, places in by_owners]
        by_owners = [(names | {task}, places[owned]) for names, places, owned in halves]
        by_owners += [(names, places[~owned]) for names, places, owned in halves]
        by_owners = [(names, places) for names, places in by_owners if len(places)]
    parts = []
    for names, owned in by_owners:
        for count in torch.bincount(steps[owned]).nonzero().flatten().tolist() if names else []:
            places = owned[steps[owned] == count]
            parts.append(_Part(layer, names, places, nn.Parameter(layer.weight.detach().view(-1)[places])))
    return parts
