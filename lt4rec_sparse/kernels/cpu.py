"""The CPU engine of csrc/: a whole multi-task MLP in one call, prepacked weights in, all heads out.

The extension is optional at build time. Without it this module still imports, `is_available()` is False and
`absence_reason()` says why; everything else then raises.

The environment variable `LT4REC_SPARSE_ISA` forces an instruction set for the process: `scalar`, `avx2`, `avx512`,
`avx512_vnni` (with VBMI), `avx512_bf16` (with both); `avx2_vnni`; on ARM `neon` and `neon_dot`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.formats import BlockWeight
from lt4rec_sparse.network import ACTIVATIONS, PRECISIONS, SLOPES, FrozenNetwork, Slope, slopes_shape

_engine: Any
_absence_reason = ""
try:
    from lt4rec_sparse.kernels import _engine  # type: ignore[attr-defined, no-redef, unused-ignore]
except ImportError as error:
    _engine = None
    _absence_reason = str(error)
_tensors = getattr(Tensor, "__dlpack_c_exchange_api__", None)
if _engine is not None and (_tensors is None or not _engine.use_tensors(Tensor, _tensors)):
    _engine = None
    _absence_reason = f"torch {torch.__version__} shows no tensors through DLPack 1's C functions, as 2.11 and newer do"

_ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}  # of csrc/engine.h
PATHS = ("auto", "tables", "slices", "blocks", "filled")
Path = Literal["auto", "tables", "slices", "blocks", "filled"]
_PATH_CODES = {path: code for code, path in enumerate(PATHS)}  # of csrc/engine.h
_FASTEST = 5  # of csrc/engine.h: the faster path for the batch, or STATUS_NO_LAYOUT
LAYOUTS = ("tables", "slices", "blocks", "filled")  # bit i of the engine's layouts
UNSTRUCTURED = ("tables", "slices", "filled")
_ACTIVATION_DTYPES = (torch.float32, torch.bfloat16)


class PackLayer(NamedTuple):
    """One task's layer as the engine takes it: `activation(x @ (weight * mask).T + bias)`; contiguous CPU tensors.

    Layers of several tasks that hold the same `values` and `planes` share the weight. A kept weight may be 0; it still
    meets its activation.
    """

    # float32 [nnz]: what any task keeps, row by row, columns ascending; or [blocks, 16, 4], as BlockWeight has them
    values: Tensor
    # uint8 [tasks, rows, ceil(columns / 8)], a bit per weight or block, as CompressedWeight.bitmask; None: dense
    planes: Tensor | None
    task: int  # the plane that this layer reads
    bias: Tensor | None  # float32 [out_features]
    in_features: int
    out_features: int
    activation: str  # one of network.ACTIVATIONS
    # Of the input, in int8 only: q = round(x / input_scale) + input_zero_point, within 0 to 255.
    input_scale: float = 0.0
    input_zero_point: int = 0
    slope: Slope = 0.0  # as a layer of FrozenNetwork has it
    takes_bias: bool = False  # its bias comes with each call; all layers that read x, or none


def is_available() -> bool:
    """Whether the engine was built for this installation."""
    return _engine is not None


def absence_reason() -> str:
    """Why the engine is absent, as the import put it; empty where it is present."""
    return _absence_reason


def isa() -> str:
    """Name the instruction set in force: the best that this machine has, unless one was forced."""
    return str(engine().isa())


def supported_isas() -> tuple[str, ...]:
    """Name the instruction sets of this build that this machine runs, slowest first."""
    return tuple(engine().supported_isas())


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Force an instruction set for the whole process, for tests and benchmarks.

    Raises:
        ValueError: If this machine or this build lacks it.
    """
    before = isa()
    _force_isa(name)
    try:
        yield
    finally:
        _force_isa(before)


def prepack(
    network: FrozenNetwork,
    precision: str = "fp32",
    layouts: Sequence[str] | None = None,
    batch: int | None = None,
    takes_bias: bool = False,
) -> Tensor:
    """Lay out a frozen network for the kernels (`prepack_layers`), straight from its union values and bit planes.

    Without `layouts` it takes those that the instruction set in force runs fastest: for `batch` rows, or for any number
    of them. With `takes_bias` the layers that read x have no bias: each call brings theirs.

    Raises:
        ValueError: As `prepack_layers`; or if int8 is wanted of a network without quantisation parameters.
    """
    if precision == "int8" and network.quantization is None:
        raise ValueError("network: got one without quantisation parameters, wanted a calibrated one for int8")
    in_blocks = network.is_in_blocks if layouts is None else "blocks" in layouts
    return prepack_layers(pack_layers(network, in_blocks, takes_bias), precision, layouts, batch)


def pack_layers(network: FrozenNetwork, in_blocks: bool, takes_bias: bool = False) -> list[list[PackLayer]]:
    """Return each task's layers in canonical form, with the blocks of a network `in_blocks` or as single weights.

    With `takes_bias` the layers that read x have no bias: each call brings theirs.
    """
    weights = [layer.weight if in_blocks else layer.weight.as_shared() for layer in network.hidden]
    shared = [
        (layer, _as_float(weight.values), weight.bitmask.contiguous())
        for layer, weight in zip(network.hidden, weights, strict=True)
    ]
    tasks = []
    for t, task in enumerate(network.tasks):
        layers = [
            PackLayer(
                values,
                planes,
                t,
                None if layer.bias is None else _as_float(layer.bias),
                layer.weight.shape[1],
                layer.weight.shape[0],
                layer.activation,
                slope=_contiguous(layer.slope),
            )
            for layer, values, planes in shared
        ]
        if network.heads:
            head = network.heads[task]
            rows, columns = head.weight.shape
            bias = None if head.bias is None else _as_float(head.bias)
            weight = _as_float(head.weight).flatten()
            layers.append(
                PackLayer(weight, None, 0, bias, columns, rows, head.activation, slope=_contiguous(head.slope))
            )
        if network.quantization is not None:
            parameters = network.quantization[task]
            layers = [
                layer._replace(input_scale=scale, input_zero_point=zero_point)
                for layer, (scale, zero_point) in zip(layers, parameters, strict=True)
            ]
        layers[0] = layers[0]._replace(takes_bias=takes_bias)
        tasks.append(layers)
    return tasks


def prepack_layers(
    tasks: Sequence[Sequence[PackLayer]],
    precision: str = "fp32",
    layouts: Sequence[str] | None = None,
    batch: int | None = None,
) -> Tensor:
    """Lay out the layers of all tasks for the kernels: one blob for every instruction set.

    Where several tasks share the weight of the first layer, what they keep in common is multiplied with `x` once, for
    each set of tasks for which that pays. The blob is private to this build of the engine and can be copied, but is not
    for the disk: that takes the canonical format. Its byte specification stands in csrc/engine.h.

    Args:
        tasks: For each task its layers in order; all tasks read the same `x`.
        precision: "fp32"; "bf16": weights and the activations that enter a layer rounded to bfloat16, summed in
            float32; "int8": signed 8-bit weights with a scale for each output feature, unsigned 8-bit activations
            with the layers' input_scale and input_zero_point, summed exactly.
        layouts: Some of "tables", for small batches and int8; "slices" (sliced ELLPACK), for large ones; and "filled",
            blocks of 16 x 4 that hold any kept weight, for dense masks. int8 has slices where no sum passes 2^24, and
            otherwise tables. Or "blocks" alone, for layers in blocks and dense ones. There the scale of a row in int8
            is such that two neighbouring weights of a block add up to at most 128 steps. None: the fastest ones of the
            instruction set in force.
        batch: With None for `layouts`: rows of the calls; None for any number.

    Returns:
        `[bytes]`, uint8.

    Raises:
        ValueError: If a layer is not canonical, the layers do not chain, there is no such precision or layout, or a
            layer cannot have the precision (in int8: an input_scale that is not above 0, a weight that is not finite).
    """
    module = engine()
    precision_code = _precision_code(precision)
    known = {"blocks"} if "blocks" in (layouts or ()) else set(UNSTRUCTURED)
    if layouts is not None and (not layouts or not known.issuperset(layouts)):
        allowed = f"blocks alone, or some of {', '.join(UNSTRUCTURED)}"
        raise ValueError(f"layouts: got {tuple(layouts)}, wanted {allowed}")
    if batch is not None and batch < 0:
        raise ValueError(f"batch: got {batch}, wanted 0 or more")
    if not tasks or not all(tasks):
        raise ValueError(f"tasks: got layer counts {[len(layers) for layers in tasks]}, wanted at least one layer each")
    in_features = tasks[0][0].in_features
    rows = []
    for t, layers in enumerate(tasks):
        wanted = in_features
        for i, layer in enumerate(layers):
            where = f"tasks[{t}][{i}]"
            if layer.in_features != wanted:
                raise ValueError(f"{where}.in_features: got {layer.in_features}, wanted {wanted}")
            rows.append(_canonical_layer(layer, where, is_head=i == len(layers) - 1))
            wanted = layer.out_features
    table = torch.tensor(rows, dtype=torch.int64)
    bits = sum(1 << LAYOUTS.index(layout) for layout in set(layouts or ()))
    blob = torch.empty(0, dtype=torch.uint8)  # whose memory torch aligns to 64 bytes
    calls = -1 if batch is None else batch
    module.prepack(
        table.data_ptr(), len(rows), precision_code, bits, calls, lambda nbytes: blob.resize_(nbytes).data_ptr()
    )
    return blob


class Prepacked:
    """A prepacked network, ready to be called: what a call would otherwise look up every time.

    Args:
        prepacked: What `prepack` returned; its contents are trusted.

    Raises:
        ValueError: If it is no blob of this build.
    """

    def __init__(self, prepacked: Tensor) -> None:
        self.facts = describe(prepacked)
        self._prepacked = prepacked  # whose memory the address stays good for
        self._blob = _blob_address(prepacked)
        module = engine()
        self.run_plain: Callable[..., int] = partial(module.run, *self._blob)
        self.run_new: Callable[[Tensor, int, int], Tensor | None] = partial(
            module.run_new, *self._blob, torch.empty, self.facts.outputs
        )

    def __reduce__(self) -> tuple[type[Prepacked], tuple[Tensor]]:
        """Make copies anew: each holds the address of its own memory."""
        return type(self), (self._prepacked,)

    def path_for(self, batch: int) -> str:
        """Name the fastest path for `batch` rows on the instruction set in force: the layout that it wants."""
        return PATHS[_engine.path(*self._blob, batch)]

    def run(
        self, x: Tensor, out: Tensor, threads: int | None = None, path: Path = "auto", bias: Tensor | None = None
    ) -> None:
        """Write all tasks' heads for `x` into `out`, as `sparse_mlp` does.

        `bias` is that of the layers that read x, where they take it from the call: float32 `[batch, features]` or
        `[1, features]` for all rows, those of each task's first layer side by side.
        """
        given = () if bias is None else (bias,)
        if threads is None:
            threads = torch.get_num_threads()
        if path not in _PATH_CODES:
            raise ValueError(f"path: got {path!r}, wanted one of {', '.join(PATHS)}")
        status = self.run_plain(x, out, threads, _PATH_CODES[path], *given)
        if status in (_engine.STATUS_NOT_READ, _engine.STATUS_BAD_SHAPE):
            status = self._run_checked(x, out, threads, _PATH_CODES[path], bias)
        if status == _engine.STATUS_NOT_READ:
            raise ValueError(
                "x or out: got a tensor without memory of its own, as under torch.vmap, wanted plain tensors"
            )
        if status == _engine.STATUS_NO_LAYOUT:
            raise ValueError(f"path: got {path!r}, wanted what the blob was prepacked for: {self.facts.layouts}")
        if status == _engine.STATUS_NO_MEMORY:
            raise MemoryError("no scratch memory for sparse_mlp")
        if status:  # the header was read when this object was made: someone wrote over it
            raise ValueError(_NO_BLOB)

    def _run_checked(self, x: Tensor, out: Tensor, threads: int, path: int, bias: Tensor | None) -> int:
        """Run what the engine does not read as it is: name what is wrong, or take a tensor of another class."""
        in_features, outputs = self.facts.in_features, self.facts.outputs
        if x.ndim != 2 or x.shape[1] != in_features:
            raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [batch, {in_features}]")
        _check_rows("x", x, _ACTIVATION_DTYPES)
        batch = len(x)
        if out.shape != (batch, outputs):
            raise ValueError(f"out: got shape {tuple(out.shape)}, wanted [{batch}, {outputs}]")
        _check_rows("out", out, (torch.float32,))
        if batch > 1 and out.stride(0) < outputs:
            raise ValueError(f"out: got row stride {out.stride(0)}, wanted at least {outputs}: rows overlap")
        if threads < 1:
            raise ValueError(f"threads: got {threads}, wanted at least 1")
        features = self.facts.bias_features
        given = torch.empty(0, 0) if bias is None else bias
        wanted = ((batch, features), (1, features)) if features else ((0, 0),)
        if tuple(given.shape) not in wanted:
            raise ValueError(f"bias: got shape {tuple(given.shape)}, wanted {wanted[0]}: the layers' that read x")
        _check_rows("bias", given, (torch.float32,))
        plain = (tensor.detach().as_subclass(Tensor) for tensor in (x, out))
        return self.run_plain(*plain, threads, path, *(() if bias is None else (bias.detach().as_subclass(Tensor),)))


def sparse_mlp(x: Tensor, prepacked: Tensor, out: Tensor, threads: int | None = None, path: Path = "auto") -> None:
    """Write all tasks' heads for `x` into `out`.

    A row's result depends on that row alone: it is equal to the bit for every batch size, thread count, path and
    instruction set, but for the sign of a zero. Pruned weights never meet an activation, so they cannot turn its Inf
    into NaN. In int8 a row with a NaN yields NaN, and an Inf counts as the largest activation there is.

    Args:
        x: `[batch, in_features]`, float32 or bfloat16, CPU; rows may be strided, elements of a row not.
        prepacked: What `prepack` returned; its contents are trusted. For repeated calls, construct a `Prepacked`.
        out: `[batch, outputs]`, float32, CPU, tasks in order; rows may be strided. Must not overlap `x`.
        threads: Upper bound; None takes `torch.get_num_threads()`.
        path: Which of the kernels; "auto" takes the fastest one for the batch, or one that `prepacked` has.

    Raises:
        ValueError: If a shape, dtype, device or stride is wrong, or `prepacked` is no blob of this build.
        MemoryError: If scratch memory runs out; `out` is undefined then.
    """
    Prepacked(prepacked).run(x, out, threads, path)


class Executor:
    """A frozen network in the engine. Each layout is prepacked when a batch first needs it, and kept.

    Args:
        network: The network.
        precision: "fp32", "bf16" or "int8".
        layout: One for every number of rows; None for what is fastest for each.

    Raises:
        ValueError: If there is no such precision, or int8 is wanted and the network is not calibrated. A layout that
            the network cannot have is refused by the first call.
    """

    def __init__(self, network: FrozenNetwork, precision: str = "fp32", layout: str | None = None) -> None:
        _precision_code(precision)
        if precision == "int8" and network.quantization is None:
            raise ValueError("network: got one without quantisation parameters, wanted a calibrated one for int8")
        self.network, self.precision, self.layout = network, precision, layout
        self._path = _FASTEST if layout is None else _PATH_CODES["auto"]  # with one layout there is one way
        self._prepacked: dict[str, Prepacked] = {}
        self._recent: Prepacked | None = None

    def __reduce__(self) -> tuple[type[Executor], tuple[FrozenNetwork, str, str | None]]:
        """Copy the network alone: a copy prepacks for itself, where it first runs."""
        return type(self), (self.network, self.precision, self.layout)

    def run(self, x: Tensor, out: Tensor) -> None:
        """Write every task's outputs for `x [rows, in_features]`, side by side, into `out [rows, outputs]`."""
        if self._recent is not None and not self._recent.run_plain(x, out, torch.get_num_threads(), self._path):
            return
        prepacked = self._for(len(x))
        prepacked.run(x, out)
        self._recent = prepacked

    def kernel_for(self, rows: int) -> str:
        """Name the layout that a batch of so many rows takes."""
        (layout,) = self._for(rows).facts.layouts
        return layout

    def _for(self, rows: int) -> Prepacked:
        prepacked = None
        if self._recent is not None:
            prepacked = self._prepacked.get(self.layout or self._recent.path_for(rows))
        if prepacked is None:
            layouts = None if self.layout is None else (self.layout,)
            prepacked = Prepacked(prepack(self.network, self.precision, layouts, rows))
            (path,) = prepacked.facts.layouts
            prepacked = self._prepacked.setdefault(path, prepacked)
        return prepacked

    def run_new(self, x: Tensor) -> Tensor | None:
        """Return the outputs where the engine reads `x` as it is and the layout is there; None: `run` decides."""
        return None if self._recent is None else self._recent.run_new(x, torch.get_num_threads(), self._path)

    @property
    def prepacked_nbytes(self) -> dict[str, int]:
        """Layout -> bytes of what is prepacked so far."""
        return {path: prepacked.facts.nbytes for path, prepacked in self._prepacked.items()}


class Facts(NamedTuple):
    """A blob's header."""

    precision: str
    layouts: tuple[str, ...]
    in_features: int
    outputs: int
    tasks: int
    layers: int  # a layer that tasks share counts once more than they are
    bias_features: int  # of the biases that come with a call
    nnz: int  # kept weights of all tasks
    multiply_adds: int  # of one row of the batch: what tasks share counts once
    slice_multiply_adds: int  # the same, with padding, on the path for large batches
    table_multiply_adds: int  # and on the path for small ones
    block_multiply_adds: int  # and in blocks, filled or not
    filled_multiply_adds: int  # what filled blocks form, whether the blob has them or not; 0 in int8 and in blocks
    nbytes: int
    slice_nbytes: int  # of these, read by one path only
    table_nbytes: int
    block_nbytes: int


def describe(prepacked: Tensor) -> Facts:
    """Read a blob's header.

    Raises:
        ValueError: If `prepacked` is no blob of this build.
    """
    facts = engine().describe(*_blob_address(prepacked))
    if facts is None:
        raise ValueError(_NO_BLOB)
    precision, layouts, *others = facts
    return Facts(PRECISIONS[precision], tuple(name for i, name in enumerate(LAYOUTS) if layouts >> i & 1), *others)


_NO_BLOB = "prepacked: got no blob of this build of the engine, wanted what prepack() returned, 8-byte aligned"


def engine() -> Any:
    """Return the module of csrc/.

    Raises:
        RuntimeError: If it was not built.
    """
    if _engine is None:
        raise RuntimeError(f"the native engine is absent: {_absence_reason}")
    return _engine


def _precision_code(precision: str) -> int:
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, wanted one of {', '.join(PRECISIONS)}")
    return PRECISIONS.index(precision)


def _force_isa(name: str) -> None:
    supported = supported_isas()
    if name not in supported:
        raise ValueError(f"isa: got {name!r}, wanted one that this machine runs: {', '.join(supported)}")
    engine().set_isa(supported.index(name))


def _canonical_layer(layer: PackLayer, where: str, is_head: bool) -> tuple[int, ...]:
    """The words of CanonicalLayer in csrc/engine.h, with every length checked; contents are checked there."""
    rows, columns = layer.out_features, layer.in_features
    if columns < 1 or rows < 1:
        raise ValueError(f"{where}: got in_features {columns}, out_features {rows}, wanted at least 1")
    if layer.activation not in _ACTIVATION_CODES:
        raise ValueError(f"{where}.activation: got {layer.activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
    is_blocks = layer.values.dim() == 3
    block = BlockWeight.BLOCK if is_blocks else (1, 1)
    nnz = layer.values.numel() // (block[0] * block[1])
    _check_part(f"{where}.values", layer.values, torch.float32, (nnz, *block) if is_blocks else (nnz,))
    tasks = 1
    if layer.planes is not None:
        tasks = max([1, *layer.planes.shape[:1]])  # no planes have no address, which would make the layer a dense one
        grid = -(-rows // block[0]), -(-columns // block[1])
        _check_part(f"{where}.planes", layer.planes, torch.uint8, (tasks, grid[0], (grid[1] + 7) // 8))
    if layer.bias is not None:
        _check_part(f"{where}.bias", layer.bias, torch.float32, (rows,))
    slopes = layer.slope if isinstance(layer.slope, Tensor) else None
    if slopes is not None:
        shape = slopes_shape(layer.activation, rows)
        if shape is None:
            wanted = f"one for {' or '.join(SLOPES)} alone"
            raise ValueError(f"{where}.slope: got a tensor for {layer.activation}, wanted {wanted}")
        _check_part(f"{where}.slope", slopes, torch.float32, shape)
    return (
        is_blocks,
        layer.values.data_ptr(),
        0 if layer.planes is None else layer.planes.data_ptr(),
        tasks,
        layer.task,
        0 if layer.bias is None else layer.bias.data_ptr(),
        columns,
        rows,
        nnz,
        _ACTIVATION_CODES[layer.activation],
        is_head,
        *struct.unpack("<q", struct.pack("<d", layer.input_scale)),
        layer.input_zero_point,
        *struct.unpack("<q", struct.pack("<d", 0.0 if slopes is not None else layer.slope)),
        0 if slopes is None else slopes.data_ptr(),
        layer.takes_bias,
    )


def _contiguous(slope: Slope) -> Slope:
    return _as_float(slope) if isinstance(slope, Tensor) else slope


def _as_float(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _check_part(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted {shape}")
    if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: got {tensor.dtype} on {tensor.device}, contiguous {tensor.is_contiguous()}, "
            f"wanted contiguous {dtype} on cpu"
        )


def _check_rows(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes or tensor.device.type != "cpu":
        wanted = " or ".join(map(str, dtypes))
        raise ValueError(f"{name}: got {tensor.dtype} on {tensor.device}, wanted {wanted} on cpu")
    # The stride of a dimension of size 1 means nothing and may be anything.
    if tensor.shape[1] != 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name}: got strides {tensor.stride()}, wanted 1 within a row")


def _blob_address(prepacked: Tensor) -> tuple[int, int]:
    if prepacked.dtype != torch.uint8 or prepacked.device.type != "cpu" or not prepacked.is_contiguous():
        raise ValueError(
            f"prepacked: got {prepacked.dtype} on {prepacked.device}, contiguous {prepacked.is_contiguous()}, "
            "wanted contiguous uint8 on cpu"
        )
    return prepacked.data_ptr(), prepacked.numel()


def _obey_environment() -> None:
    wanted = os.environ.get("LT4REC_SPARSE_ISA")
    if wanted is None:
        return
    try:
        _force_isa(wanted)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"LT4REC_SPARSE_ISA: {error}") from error


_obey_environment()
