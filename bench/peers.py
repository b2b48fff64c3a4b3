"""The opponents of the CPU engine: everything else that runs a pruned MLP here, each at its best and checked.

Each opponent gets what helps it. Weights are packed, models compiled and buffers bound before the clock starts, for one
batch size. bf16 opponents of torch get an `x` that is bf16 already; all others convert or quantise within their time.
int8 opponents are calibrated on `x` too, so that nothing clips. Sparse opponents take the weights' zeros, keep
activations as `[features, batch]` between layers and may return a transposed view.

`peers` finds the opponents that run on this machine and gives the reason for each that does not: it is not installed,
the processor lacks what it needs, it raises, or its scores are wrong.

- The extra `bench` installs onnx, ONNX Runtime, OpenVINO and scipy.
- SparseProp has no wheel, and its build needs pybind11: with the environment active,
  `pip install pybind11 setuptools && pip install --no-build-isolation sparseprop`.
- DeepSparse (evaluation licence) needs Python 3.8 to 3.11 and an old onnx, so it runs in a Python of its own:
  `python3.11 -m venv deepsparse && deepsparse/bin/pip install deepsparse 'numpy<2'`, and
  `LT4REC_BENCH_DEEPSPARSE_PYTHON=deepsparse/bin/python`.

`ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16` in the environment takes AMX away from torch and from OpenVINO; ONNX Runtime
(MLAS) has no such switch. `threads` goes to every runtime with a setting of its own; torch's is set by the caller
(`torch.set_num_threads`), SparseProp's is OpenMP's, and scipy has one thread.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import runtimes
from bench.runtimes import DEEPSPARSE_PYTHON as DEEPSPARSE_PYTHON
from bench.runtimes import Array, Made, Model, UnavailableError
from lt4rec_sparse.stopwatch import Timing, interleaved
from tests.oracle import UNIT_ROUNDOFF, Bounded, Layer, assert_rounding


class Peer(NamedTuple):
    """One opponent, ready to be timed on the `x` it was made for."""

    name: str
    precision: str  # "fp32", "bf16" or "int8"
    kind: str  # "dense" or "sparse"
    run: Callable[[], object]  # makes `calls` forward passes
    scores: Callable[[], Tensor]  # the result of a pass, `[batch, out_features]`
    calls: int = 1


class Absent(NamedTuple):
    """An opponent that does not run on this machine, and why."""

    name: str
    reason: str


class WrongError(Exception):
    """An opponent whose scores are not the MLP's."""


class Case(NamedTuple):
    """What an opponent is built from."""

    layers: Sequence[Layer]
    x: Tensor
    threads: int
    folder: Path  # for models; deleted with the opponents
    stack: ExitStack  # for whatever must end with the opponents


Of = TypeVar("Of")
Maker = tuple[str, str, Callable[[Of], Made]]  # precision and kind of a `Peer`, and what makes it of a case
TORCHS_OWN = ("torch", "mkl", "onednn")


@contextmanager
def peers(
    layers: Sequence[Layer], x: Tensor, threads: int, names: Collection[str] | None = None
) -> Iterator[tuple[list[Peer], list[Absent]]]:
    """Make the opponents for one MLP and one batch, check each, and leave nothing running afterwards.

    An opponent that raises, or whose scores are not the MLP's, is absent too, with its reason. Those that come with
    torch raise what they raise.

    Args:
        layers: The MLP; pruned weights are zeros in place, `[out_features, in_features]`, float32.
        x: `[batch, in_features]`, float32, row-major.
        threads: Number of threads for runtimes that have a setting of their own.
        names: Those of `NAMES` to make; None makes all.

    Yields:
        The opponents that run, and those that do not, each with its reason.
    """
    with ExitStack() as stack:
        case = Case(layers, x, threads, Path(stack.enter_context(TemporaryDirectory())), stack)
        references = {precision: reference(layers, x, precision) for precision in ("fp32", "bf16", "int8")}
        makers = {name: _MAKERS[name] for name in (NAMES if names is None else names)}
        yield gathered(makers, case, references)


def gathered(
    makers: Mapping[str, Maker[Of]], case: Of, references: Mapping[str, Bounded]
) -> tuple[list[Peer], list[Absent]]:
    """Make each opponent of a case and check it; return those that run, and those that do not with their reasons."""
    found = [_attempt(name, maker, case, references) for name, maker in makers.items()]
    return [one for one in found if isinstance(one, Peer)], [one for one in found if isinstance(one, Absent)]


def _attempt(name: str, maker: Maker[Of], case: Of, references: Mapping[str, Bounded]) -> Peer | Absent:
    precision, kind, make = maker
    try:
        with torch.inference_mode():
            peer = Peer(name, precision, kind, *make(case))
        check(peer, references[precision])
    except (ImportError, UnavailableError, WrongError) as error:
        return Absent(name, str(error))
    except Exception as error:  # code of others: ONNX Runtime's errors derive from nothing narrower
        if name.partition(" ")[0] in TORCHS_OWN:
            raise  # it comes with torch: without it the opponents would be weaker, and nothing would say so
        first_line = str(error).strip().partition("\n")[0]
        return Absent(name, f"raised {type(error).__name__}: {first_line}")
    return peer


def check(peer: Peer, expected: Bounded) -> None:
    """Raise `WrongError` unless every score lies within its bound; `expected` is the `reference` of its precision."""
    with torch.inference_mode():
        scores = peer.scores()
    try:
        assert_rounding(scores, expected)
    except AssertionError as error:
        raise WrongError(f"wrong scores, so not timed: {error}") from None


def timings(opponents: Sequence[Peer], **settings: Any) -> dict[str, Timing]:
    """Time a forward pass of each in interleaved rounds; `settings` are those of `stopwatch.interleaved`."""
    with torch.inference_mode():
        measured = interleaved({peer.name: peer.run for peer in opponents}, **settings)
    return {peer.name: Timing(*(us / peer.calls for us in measured[peer.name])) for peer in opponents}


def reference(layers: Sequence[Layer], x: Tensor, precision: str) -> Bounded:
    """Return the MLP in float64 and how far a correct opponent of this precision may lie from it, elementwise.

    The worst case carried from layer to layer (`tests.oracle.mlp_reference`) is as large as the scores themselves for
    four wide layers, in fp32 too, so it would accept anything. But roundings are many and independent: if a value v
    enters the score with slope dy/dv and is off by a uniform error of at most d(v), which is sub-Gaussian with its
    variance d(v)^2 / 3, then to first order

        P(|y - ref64| > 6 sqrt(sum of (dy/dv d(v))^2 / 3)) < 2 exp(-6^2 / 2) = 3e-8,

    with slopes from back propagation. x, the weights, the biases, each layer's sum and the result of its activation are
    rounded: fp32 and bf16 by d(v) = u |v|, int8 by half a step of 8 bits over the tensor's range. The k additions of a
    sum add at most u_fp32 (|h| @ |W|.T + |b|) each. An opponent may round any of these or none; the gate only asks
    whether it computes this MLP.
    """
    hs, zs = _forward(layers, x)
    seen_hs, seen_zs = _forward(layers, _calibration(x))
    off = partial(_off, precision)
    variance = torch.zeros_like(hs[-1])
    for out in range(variance.shape[1]):
        slope = torch.zeros_like(variance)
        slope[:, out] = 1
        for i, layer in reversed(list(enumerate(layers))):
            weight, bias = layer.weight.double(), _bias(layer).double()
            magnitude = hs[i].abs() @ weight.abs().T + bias.abs()
            additions = weight.shape[1] ** 0.5 * UNIT_ROUNDOFF[torch.float32] * magnitude
            activated = off(hs[i + 1], seen_hs[i + 1]) + _ACTIVATION_ERROR[layer.activation]
            variance[:, out] += (slope * activated).square().sum(1)
            slope = slope * _SLOPES[layer.activation](zs[i])
            sums = off(zs[i], seen_zs[i]).square() + off(bias, bias).square() + additions.square()
            variance[:, out] += (slope.square() * sums).sum(1)
            variance[:, out] += (slope.square() @ off(weight, weight).square() * hs[i].square()).sum(1)
            slope = slope @ weight
        variance[:, out] += (slope * off(hs[0], seen_hs[0])).square().sum(1)
    return Bounded(hs[-1], 6 * (variance / 3).sqrt())


def _forward(layers: Sequence[Layer], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return x and the output of every layer, and the sum of every layer, in float64."""
    hs, zs = [x.double()], []
    for layer in layers:
        zs.append(F.linear(hs[-1], layer.weight.double(), _bias(layer).double()))
        hs.append(_ACTIVATIONS[layer.activation](zs[-1].clone()))
    return hs, zs


def _calibration(x: Tensor) -> Tensor:
    """Return `x`, so that nothing clips, and for a small batch the same rows with their columns shifted.

    The range of a single row would end at its own score, and clipping would then hide any error in that score.
    """
    return torch.cat([x, *(x.roll(shift, 1) for shift in range(1, 1 + 64 // len(x)))])


def _off(precision: str, values: Tensor, seen: Tensor) -> Tensor:
    """Return the largest rounding error of each value, where `seen` gave int8 its range; zero is exact."""
    if precision == "int8":
        return _step(seen) / 2 * (values != 0)
    return UNIT_ROUNDOFF[_DTYPES[precision]] * values.abs()


def _step(seen: Tensor) -> Tensor:
    """Return the step of 8 bits over zero and the range of `seen`."""
    return ((seen.max().clamp(min=0) - seen.min().clamp(max=0)) / 255).clamp(min=torch.finfo(torch.float32).tiny)


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# In place: a float64 caller clones.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "sigmoid": torch.sigmoid_,
    "none": lambda z: z,
}
_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda z: (z > 0).double(),
    "sigmoid": lambda z: z.sigmoid() * (1 - z.sigmoid()),
    "none": torch.ones_like,
}
# 1 / (1 + exp(-z)) is three operations, each within an ulp of 1, and a rational approximation is no better.
_ACTIVATION_ERROR = {"relu": 0.0, "sigmoid": 3 * 2 * UNIT_ROUNDOFF[torch.float32], "none": 0.0}


def _torch(case: Case, dtype: torch.dtype) -> Made:
    """Chain `F.linear` and in-place activations."""
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise UnavailableError("this processor has no bfloat16 arithmetic: torch would run plain loops")
    x = case.x.to(dtype)
    layers = [(w.to(dtype), None if b is None else b.to(dtype), _ACTIVATIONS[a]) for w, b, a, *_ in case.layers]

    def run() -> Tensor:
        h = x
        for weight, bias, activation in layers:
            h = activation(F.linear(h, weight, bias))
        return h

    return Made(run, lambda: run().float())


def _onednn(case: Case, dtype: torch.dtype) -> Made:
    """Chain oneDNN's fused layers on packed weights, as inductor's freezing does."""
    if not torch.backends.mkldnn.is_available():
        raise UnavailableError("this torch is built without oneDNN")
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise UnavailableError("this processor has no bfloat16 arithmetic that oneDNN uses")
    x, batch = case.x.to(dtype), len(case.x)
    pack, linear = torch.ops.mkldnn._reorder_linear_weight.default, torch.ops.mkldnn._linear_pointwise.default
    layers = [(pack(w.to(dtype), batch), None if b is None else b.to(dtype), a) for w, b, a, *_ in case.layers]

    def run() -> Tensor:
        h = x
        for weight, bias, activation in layers:
            h = linear(h, weight, bias, activation, [], "")
        return h

    return Made(run, lambda: run().float())


def _mkl(case: Case) -> Made:
    """Chain MKL's packed sgemm, which inductor's freezing takes for float32."""
    if not torch.backends.mkl.is_available():
        raise UnavailableError("this torch is built without MKL")
    x, batch = case.x, len(case.x)
    pack, linear = torch.ops.mkl._mkl_reorder_linear_weight.default, torch.ops.mkl._mkl_linear.default
    layers = [(pack(w, batch), w, b, _ACTIVATIONS[a]) for w, b, a, *_ in case.layers]

    def run() -> Tensor:
        h = x
        for packed, weight, bias, activation in layers:
            h = activation(linear(h, packed, weight, bias, batch))
        return h

    return Made(run, run)


def _torch_csr(case: Case) -> Made:
    """Chain torch's CSR (MKL's, where torch has it); int32 indices, since int64 are twice the bytes to read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        dense = [layer.weight.to_sparse_csr() for layer in case.layers]
        weights = [
            torch.sparse_csr_tensor(
                w.crow_indices().int(), w.col_indices().int(), w.values(), w.shape, check_invariants=False
            )
            for w in dense
        ]
    single = len(case.x) == 1  # a matrix-vector product is a kernel of its own, and twice as fast
    multiply = torch.addmv if single else torch.addmm
    biases = [_bias(layer) if single else _bias(layer)[:, None] for layer in case.layers]
    layers = list(zip(weights, biases, (_ACTIVATIONS[layer.activation] for layer in case.layers), strict=True))

    def run() -> Tensor:
        h = case.x[0] if single else case.x.t().contiguous()  # [features, batch]
        for weight, bias, activation in layers:
            h = activation(multiply(bias, weight, h))
        return h[None] if single else h.t()

    return Made(run, run)


def _onnxruntime(case: Case, model: Callable[[Case], Path]) -> Made:
    return runtimes.onnxruntime(_model(case, model))


def _openvino(case: Case, model: Callable[[Case], Path], precision: str) -> Made:
    return runtimes.openvino(_model(case, model), precision)


def _model(case: Case, model: Callable[[Case], Path]) -> Model:
    shape = len(case.x), len(case.layers[-1].weight)
    return Model(model(case), {"x": case.x}, shape, case.threads, case.stack)


def _gemm_model(case: Case) -> Path:
    """Write the MLP as float32 Gemms with a fixed batch, which OpenVINO runs faster than an open one."""
    from onnx import helper

    nodes: list[Any] = []
    constants: dict[str, Any] = {}
    h = "x"
    for i, layer in enumerate(case.layers):
        terms = {f"weight{i}": layer.weight} | ({} if layer.bias is None else {f"bias{i}": layer.bias})
        constants |= {name: term.numpy() for name, term in terms.items()}
        nodes.append(helper.make_node("Gemm", [h, *terms], [f"z{i}"], transB=1))
        nodes.append(helper.make_node(_ONNX[layer.activation], [f"z{i}"], [f"h{i}"]))
        h = f"h{i}"
    return _save(case, "gemm", nodes, constants)


def _int8_model(case: Case) -> Path:
    """Quantise `_gemm_model` statically."""
    from onnxruntime.quantization import quant_pre_process

    prepared, path = case.folder / "prepared.onnx", case.folder / "int8.onnx"
    if not path.exists():
        quant_pre_process(_gemm_model(case), prepared, skip_optimization=True, skip_symbolic_shape=True)
        batches = _calibration(case.x).split(len(case.x))  # the model's batch is fixed
        runtimes.quantized(prepared, path, [{"x": rows.numpy()} for rows in batches])
    return path


def _integer_model(case: Case) -> Path:
    """Write the MLP as SparseML exports it, the one int8 graph that DeepSparse runs sparse.

    A layer is QuantizeLinear, MatMulInteger, an int32 Add, Cast and Mul; weights have one scale per matrix. DeepSparse
    runs any other graph of the same MLP on the dense ONNX Runtime that is built into it.
    """
    from onnx import TensorProto, helper

    nodes: list[Any] = []
    constants: dict[str, Any] = {}
    h = "x"
    for i, (layer, values) in enumerate(zip(case.layers, _forward(case.layers, _calibration(case.x))[0], strict=False)):
        step = _step(values).item()
        weight_step = max(layer.weight.abs().max().item() / 127, float(np.finfo(np.float32).tiny))
        constants |= {
            f"step{i}": np.float32(step),
            f"zero{i}": np.uint8(round(-min(values.min().item(), 0.0) / step)),
            f"weight{i}": np.ascontiguousarray((layer.weight / weight_step).round().to(torch.int8).t().numpy()),
            f"weight_zero{i}": np.int8(0),
            f"bias{i}": (_bias(layer).double() / (step * weight_step)).round().to(torch.int32).numpy(),
            f"scale{i}": np.float32(step * weight_step),
        }
        nodes += [
            helper.make_node("QuantizeLinear", [h, f"step{i}", f"zero{i}"], [f"q{i}"]),
            helper.make_node("MatMulInteger", [f"q{i}", f"weight{i}", f"zero{i}", f"weight_zero{i}"], [f"product{i}"]),
            helper.make_node("Add", [f"product{i}", f"bias{i}"], [f"sum{i}"]),
            helper.make_node("Cast", [f"sum{i}"], [f"cast{i}"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"cast{i}", f"scale{i}"], [f"z{i}"]),
            helper.make_node(_ONNX[layer.activation], [f"z{i}"], [f"h{i}"]),
        ]
        h = f"h{i}"
    return _save(case, "integer", nodes, constants)


_ONNX = {"relu": "Relu", "sigmoid": "Sigmoid", "none": "Identity"}


def _save(case: Case, name: str, nodes: list[Any], constants: dict[str, Any]) -> Path:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes[-1].output[0] = "y"
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, list(case.x.shape)),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [len(case.x), len(case.layers[-1].weight)]),
    ]
    initializers = [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()]
    graph = helper.make_graph(nodes, name, ends[:1], ends[1:], initializers)
    # The newest versions that DeepSparse 1.8 reads; nothing newer is needed here.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path = case.folder / f"{name}.onnx"
    onnx.save(model, path)
    return path


def _bias(layer: Layer) -> Tensor:
    return torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias


def _scipy_csr(case: Case) -> Made:
    """Chain scipy's CSR times dense."""
    from scipy.sparse import csr_array

    weights = [csr_array(layer.weight.numpy()) for layer in case.layers]
    biases = [_bias(layer).numpy()[:, None] for layer in case.layers]

    def multiply(i: int, h: Array) -> Array:
        z = weights[i] @ h
        z += biases[i]
        return z

    return _transposed(case, multiply)


def _sparseprop(case: Case) -> Made:
    """Chain SparseProp's forward kernel bare: its module would transpose the activations at every layer."""
    from scipy.sparse import csr_array
    from sparseprop import backend

    weights = [csr_array(layer.weight.numpy()) for layer in case.layers]
    biases = [_bias(layer).numpy()[:, None] for layer in case.layers]

    def multiply(i: int, h: Array) -> Array:
        w, z = weights[i], np.repeat(biases[i], h.shape[1], axis=1)
        backend.sparse_linear_vectorized_forward(h, w.indptr, w.indices, w.data, z)  # adds to z
        return z

    return _transposed(case, multiply)


def _transposed(case: Case, multiply: Callable[[int, Array], Array]) -> Made:
    """Chain `multiply(layer, h) -> z` on `[features, batch]`."""
    from scipy.special import expit

    in_place: dict[str, Callable[[Array], object]] = {
        "relu": lambda z: np.maximum(z, 0, out=z),
        "sigmoid": lambda z: expit(z, out=z),
        "none": lambda z: z,
    }
    activations = [in_place[layer.activation] for layer in case.layers]

    def run() -> Array:
        h = np.ascontiguousarray(case.x.numpy().T)
        for i, activation in enumerate(activations):
            h = multiply(i, h)
            activation(h)
        return h.T

    return Made(run, lambda: torch.from_numpy(run().copy()))


def _deepsparse(case: Case, model: Callable[[Case], Path]) -> Made:
    return runtimes.deepsparse(_model(case, model))


_MAKERS: dict[str, Maker[Case]] = {
    "torch fp32": ("fp32", "dense", partial(_torch, dtype=torch.float32)),
    "mkl fp32": ("fp32", "dense", _mkl),
    "onednn fp32": ("fp32", "dense", partial(_onednn, dtype=torch.float32)),
    "onnxruntime fp32": ("fp32", "dense", partial(_onnxruntime, model=_gemm_model)),
    "openvino fp32": ("fp32", "dense", partial(_openvino, model=_gemm_model, precision="f32")),
    "torch bf16": ("bf16", "dense", partial(_torch, dtype=torch.bfloat16)),
    "onednn bf16": ("bf16", "dense", partial(_onednn, dtype=torch.bfloat16)),
    "openvino bf16": ("bf16", "dense", partial(_openvino, model=_gemm_model, precision="bf16")),
    "onnxruntime int8": ("int8", "dense", partial(_onnxruntime, model=_int8_model)),
    "openvino int8": ("int8", "dense", partial(_openvino, model=_int8_model, precision="f32")),
    "torch csr fp32": ("fp32", "sparse", _torch_csr),
    "scipy csr fp32": ("fp32", "sparse", _scipy_csr),
    "sparseprop fp32": ("fp32", "sparse", _sparseprop),
    "deepsparse fp32": ("fp32", "sparse", partial(_deepsparse, model=_gemm_model)),
    "deepsparse int8": ("int8", "sparse", partial(_deepsparse, model=_integer_model)),
}
NAMES = tuple(_MAKERS)
