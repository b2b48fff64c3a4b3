"""A whole ONNX graph as a module: the engine's calls, and between them parts that ONNX Runtime computes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime import InferenceSession
from torch import Tensor, nn

from lt4rec_sparse.errors import InputError, told
from lt4rec_sparse.onnx.calls import Call
from lt4rec_sparse.onnx.graph import RUNTIME_ERRORS, Array
from lt4rec_sparse.onnx.ports import Port
from lt4rec_sparse.onnx.session import session_of, to_array, to_tensor
from lt4rec_sparse.onnx.steps import Part


class OnnxModule(nn.Module):
    """An ONNX graph whose pruned linear layers run in the engine, and all else in ONNX Runtime; made by `from_onnx`.

    It is for inference on the CPU: results carry no graph of autograd, and autocast changes nothing. Each part has as
    many threads of ONNX Runtime as torch had when the module was made. `calls` are the engine's, by their place and the
    name of their first node.

    Attributes:
        input_names, output_names: Of the graph, in its order.
        parts: How many runs of ONNX Runtime a call of the module takes.
    """

    def __init__(
        self,
        inputs: Sequence[Port],
        outputs: Sequence[str],
        steps: Sequence[Part | Call],
        sessions: Sequence[InferenceSession],
        constants: Mapping[str, Array],
    ) -> None:
        super().__init__()
        self.input_names = tuple(port.name for port in inputs)
        self.output_names = tuple(outputs)
        self._inputs = tuple(inputs)
        self.calls = nn.ModuleDict()
        self._steps: list[Part | tuple[str, str, str]] = []  # a part, or a call's key in `calls`, input and output
        for step in steps:
            if isinstance(step, Part):
                self._steps.append(step)
                continue
            key = f"{len(self.calls)} {step.name.replace('.', '_')}"
            self.calls[key] = step.module
            self._steps.append((key, step.input, step.output))
        self._unneeded = _unneeded(self._steps, outputs)
        self._sessions = list(sessions)
        self._constants = {name: f"constant{i}" for i, name in enumerate(constants)}  # output -> its buffer
        for name, key in self._constants.items():
            self.register_buffer(key, to_tensor(np.array(constants[name])))
        self.eval()

    @property
    def parts(self) -> int:
        """How many runs of ONNX Runtime a call of the module takes."""
        return len(self._sessions)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Compute the graph.

        Args:
            *inputs: The graph's inputs in order, on the CPU, of the dtypes and shapes that it declares.
            **named: The others by name; `module(**{"input.1": x})` where a name is no identifier.

        Returns:
            The output, or a tuple of all, in the order of `output_names`.

        Raises:
            TypeError: If an input is missing, unknown, there twice, or no tensor.
            ValueError: If one has another device, dtype or shape.
            InputError: If ONNX Runtime cannot compute a part.
        """
        values: dict[str, Any] = dict(self._checked(inputs, named))
        values |= {name: getattr(self, key).clone() for name, key in self._constants.items()}
        sessions = iter(self._sessions)
        # Under autocast calls would round what they return, and ONNX Runtime takes the dtypes of the graph.
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for step, unneeded in zip(self._steps, self._unneeded, strict=True):
                if isinstance(step, Part):
                    values.update(_run(next(sessions), step, values))
                else:
                    key, entering, leaving = step
                    values[leaving] = self.calls[key](_tensor(values[entering]))
                for name in unneeded:
                    del values[name]
        results = tuple(_tensor(values[name]) for name in self.output_names)
        return results[0] if len(results) == 1 else results

    def get_extra_state(self) -> dict[str, Any]:
        """Return the parts, with their weights, for `state_dict`."""
        parts = [step.model for step in self._steps if isinstance(step, Part)]
        return {"parts": [torch.frombuffer(bytearray(model), dtype=torch.uint8) for model in parts]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the parts of a module of the same graph from a `state_dict`.

        Raises:
            ValueError: If its nodes differ.
        """
        models = [part.numpy().tobytes() for part in state["parts"]]
        own = [step.model for step in self._steps if isinstance(step, Part)]
        if [_form(model) for model in models] != [_form(model) for model in own]:
            raise ValueError("state: got parts of another graph, wanted the same nodes")
        new = iter(models)
        self._steps = [s._replace(model=next(new)) if isinstance(s, Part) else s for s in self._steps]
        self._start()

    def extra_repr(self) -> str:
        """Show inputs and outputs, and what ONNX Runtime computes."""
        return f"{', '.join(self.input_names)} -> {', '.join(self.output_names)}, parts in ONNX Runtime: {self.parts}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_sessions"}  # which pickle refuses

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._start()

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxModule:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(
            (name, value if name == "_sessions" else copy.deepcopy(value, memo))  # sessions do not change
            for name, value in self.__dict__.items()
        )
        return new

    def _start(self) -> None:
        self._sessions = [session_of(step.model) for step in self._steps if isinstance(step, Part)]

    def _checked(self, inputs: Sequence[Tensor], named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if len(inputs) > len(self._inputs):
            raise TypeError(f"inputs: got {len(inputs)}, wanted {', '.join(self.input_names)}")
        given = dict(zip(self.input_names, inputs, strict=False))
        for name, x in named.items():
            if name in given or name not in self.input_names:
                wanted = "each input once: " if name in given else ""
                raise TypeError(f"inputs: got {name!r}, wanted {wanted}{', '.join(self.input_names)}")
            given[name] = x
        for name, dtype, shape in self._inputs:
            if name not in given:
                raise TypeError(f"{name}: got nothing, wanted a tensor")
            x = given[name]
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}: got a {type(x).__name__}, wanted a tensor")
            if x.dtype != dtype or x.device.type != "cpu":
                raise ValueError(f"{name}: got {x.dtype} on {x.device}, wanted {dtype} on cpu")
            if shape is not None and not _fits(x.shape, shape):
                sizes = ", ".join("any" if size is None else str(size) for size in shape)
                raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted [{sizes}]")
        return given


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(w is None or w == s for s, w in zip(shape, wanted, strict=True))


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else to_tensor(value)


def _run(session: InferenceSession, part: Part, values: Mapping[str, Any]) -> dict[str, Any]:
    """Run a part: its outputs are arrays of NumPy, or lists of them, where a value is a sequence."""
    feed = {name: to_array(v) if isinstance(v := values[name], Tensor) else v for name in part.inputs}
    try:
        # Not `run_with_ort_values`: with the vector that it returns a run of microseconds takes 0.15 ms.
        found = session.run(part.outputs, feed)
    except RUNTIME_ERRORS as error:
        raise InputError(f"inputs: got some that the graph does not compute ({told(error)})") from error
    return dict(zip(part.outputs, found, strict=True))


def _unneeded(steps: Sequence[Part | tuple[str, str, str]], outputs: Sequence[str]) -> list[list[str]]:
    """Return for each step what nothing reads after it."""
    kept, result = set(outputs), []
    for step in reversed(steps):
        reads, makes = (step.inputs, step.outputs) if isinstance(step, Part) else ((step[1],), (step[2],))
        last = [name for name in dict.fromkeys((*reads, *makes)) if name not in kept]
        kept.update(last)
        result.append(last)
    return result[::-1]


def _form(model: bytes) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    graph = onnx.load_model_from_string(model).graph
    return [(node.op_type, tuple(node.input), tuple(node.output)) for node in graph.node]
