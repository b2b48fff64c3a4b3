"""What a module's own forward computes, read by torch.fx: layers that follow each other become an `nn.Sequential`."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lt4rec_sparse.nn import dice
from lt4rec_sparse.nn.chain import DROPPED
from lt4rec_sparse.nn.copying import copy_of
from lt4rec_sparse.nn.masked import MaskedLinear, MaskedMLP
from lt4rec_sparse.nn.plain import FUSED
from lt4rec_sparse.nn.sparse import SparseMLP

# Functions of a tensor and numbers, and methods by name -> the module that computes the same.
FUNCTIONS: Mapping[Any, Callable[..., nn.Module]] = {
    **dict.fromkeys((F.relu, torch.relu, "relu"), lambda inplace=False: nn.ReLU()),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid"), nn.Sigmoid),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh"), nn.Tanh),
    F.dropout: lambda p=0.5, training=True, inplace=False: _dropout(training),
    F.silu: lambda inplace=False: nn.SiLU(),
    F.gelu: lambda *, approximate="none": nn.GELU(approximate),
    F.hardswish: lambda inplace=False: nn.Hardswish(),
    F.leaky_relu: lambda negative_slope=0.01, inplace=False: nn.LeakyReLU(negative_slope),
    F.elu: lambda alpha=1.0, inplace=False: nn.ELU(alpha),
}
_KINDS = (nn.Linear, nn.BatchNorm1d, *FUSED, *DROPPED)


def with_sequentials(model: nn.Module, is_wanted: Callable[[nn.Module], bool] = lambda linear: True) -> nn.Module:
    """Return a copy of `model` in which chains that only a forward shows are `nn.Sequential`s.

    Each module with a forward of its own that torch.fx can trace, the outermost ones first, becomes a
    `torch.fx.GraphModule` if a linear layer of it is followed by another one or by an activation, nothing else reads
    what is between, they are not all within one of its parts, and one of the layers `is_wanted`. A module is not traced
    if its forward has arguments with defaults or any number of them, sets attributes, or if a part of it has hooks: a
    trace would fix what they decide. It fixes too what a forward decides otherwise: by `isinstance`, by `is None`, by
    autocast within. What a forward computes without its inputs is computed once, and attributes and methods of the
    module are gone.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b = nn.Linear(8, 4), nn.Linear(4, 2)
        ...
        ...     def forward(self, x):
        ...         return self.b(F.gelu(self.a(x)))
        >>> [type(part).__name__ for part in with_sequentials(Net()).a]
        ['Linear', 'GELU', 'Linear']
    """
    return _with_sequentials(copy_of(model).eval(), is_wanted)


def traced(module: nn.Module, is_wanted: Callable[[nn.Module], bool] = lambda linear: True) -> nn.Module | None:
    """Return one module, in `eval()`, as `with_sequentials` makes it; None without a trace, or anything to gather."""
    own_forward = type(module).forward not in (nn.Module.forward, nn.Sequential.forward)
    if isinstance(module, fx.GraphModule) or not own_forward or not _takes_inputs_alone(module):
        return None
    graph = _graph_of(module)
    if graph is None:
        return None
    named = fx.Graph(tracer_cls=fx.Tracer)  # a copy is pickled by the name of its tracer
    named.output(named.graph_copy(graph, {}))
    made = fx.GraphModule(module, named, type(module).__name__)
    chains = list(_chains(made))
    if not any(_is_shown_by_none_of_its_parts(chain) and any(map(is_wanted, _linear(chain))) for chain in chains):
        return None
    read = {str(node.target): _attribute(made, str(node.target)) for node in made.graph.nodes if node.op == "get_attr"}
    for chain in chains:
        _gather(made, chain)
    # Anew: without what chains took in, and with all that is called beside each other. A name is looked up at each dot.
    called = {str(node.target): made.get_submodule(str(node.target)) for node in made.graph.nodes if _calls(node)}
    root: dict[str, Any] = {name.replace(".", "_"): part for name, part in called.items()}
    if len(root) == len(called):
        for node in made.graph.nodes:
            if _calls(node):
                node.target = str(node.target).replace(".", "_")
    else:
        root = dict(called)
    return fx.GraphModule(root | read, made.graph, type(module).__name__).eval()


def _graph_of(module: nn.Module) -> fx.Graph | None:
    """Return what a module's forward does; None where it cannot be traced, or does more than compute."""
    parts = [part for part in module.modules() if not _is_leaf(part)]
    if any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in parts):
        return None
    before = [dict(vars(part)) for part in parts]
    try:
        graph = _Tracer(parts).trace(module)
    except Exception:  # a forward that does not find tensors raises whatever it likes
        graph = None
    for part, had in zip(parts, before, strict=True):
        if vars(part).keys() != had.keys() or any(vars(part)[name] is not value for name, value in had.items()):
            vars(part).clear()
            vars(part).update(had)
            graph = None  # it has a state, which a trace loses
    return graph


def _dropout(training: bool) -> nn.Module:
    if training:
        raise TypeError("dropout: got one that drops at inference too")  # no part of a chain
    return nn.Identity()


def _calls(node: fx.Node) -> bool:
    return node.op == "call_module"


def _attribute(module: nn.Module, path: str) -> Any:
    return operator.attrgetter(path)(module)


def _with_sequentials(module: nn.Module, is_wanted: Callable[[nn.Module], bool]) -> nn.Module:
    if _is_leaf(module):
        return module
    if (made := traced(module, is_wanted)) is not None:
        return made
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _with_sequentials(child, is_wanted)
    return module


class _Tracer(fx.Tracer):
    def __init__(self, parts: Collection[nn.Module] = ()) -> None:
        super().__init__()
        self._parts = set(parts)  # known beforehand: what a Dice computes cannot be tried while calls are traced

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self._parts


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module is one operation: torch's own, or ours, or another library's that is fused as ours."""
    is_torchs = type(module).__module__.startswith("torch.nn") and not isinstance(
        module, nn.Sequential | nn.ModuleList | nn.ModuleDict
    )
    return is_torchs or isinstance(module, MaskedLinear | MaskedMLP | SparseMLP) or _is_dice(module)


def _is_dice(module: nn.Module) -> bool:
    return dice.is_called_so(module) and dice.difference(module) is None


def _takes_inputs_alone(module: nn.Module) -> bool:
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return all(p.kind in plain and p.default is inspect.Parameter.empty for p in parameters)


def _chains(made: fx.GraphModule) -> Iterator[dict[fx.Node, nn.Module]]:
    """Yield linear layers with what follows each and reads nothing else: node -> the module that computes it."""
    taken: set[fx.Node] = set()
    for first in made.graph.nodes:
        linear = _part(made, first)
        if first in taken or not isinstance(linear, nn.Linear):
            continue
        chain: dict[fx.Node, nn.Module] = {first: linear}
        node = first
        while len(node.users) == 1:
            (node,) = node.users
            part = _part(made, node)
            if part is None:
                break
            chain[node] = part
        if any(not isinstance(part, DROPPED) for part in list(chain.values())[1:]):
            taken.update(chain)
            yield chain


def _linear(chain: Mapping[fx.Node, nn.Module]) -> Iterator[nn.Module]:
    return (part for part in chain.values() if isinstance(part, nn.Linear))


def _is_shown_by_none_of_its_parts(chain: Mapping[fx.Node, nn.Module]) -> bool:
    """Whether a chain is not within one part of the module: an `nn.Sequential` shows it, another has its own trace."""
    scopes = []
    for node in chain:
        names = list(node.meta.get("nn_module_stack", {}))  # the parts that ran it, from without
        scopes.append((names[:-1] if node.op == "call_module" else names)[:1])
    return not scopes[0] or any(scope != scopes[0] for scope in scopes)


def _gather(made: fx.GraphModule, chain: Mapping[fx.Node, nn.Module]) -> None:
    """Let one `nn.Sequential`, in the place of the first layer, compute a chain."""
    first, *others = chain
    name = str(first.target)
    if sum(node.target == first.target for node in made.graph.nodes if node.op == "call_module") > 1:
        name = f"{name}_then_{'_'.join(str(node.name) for node in others)}"
    made.add_submodule(name, nn.Sequential(*chain.values()))
    first.target = name
    others[-1].replace_all_uses_with(first)
    for node in reversed(others):
        made.graph.erase_node(node)


def _part(made: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the module that computes what a node does of one tensor alone, if it is of a kind that chains take."""
    if len(node.all_input_nodes) != 1 or not node.args or node.args[0] is not node.all_input_nodes[0]:
        return None
    if node.op == "call_module":
        module = made.get_submodule(str(node.target))
        is_of_chains = isinstance(module, _KINDS) or _is_dice(module)
        return module if is_of_chains and len(node.args) == 1 and not node.kwargs else None
    make = FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    try:
        return None if make is None else make(*node.args[1:], **node.kwargs)
    except TypeError:  # arguments that the module does not have
        return None
