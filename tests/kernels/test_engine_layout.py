"""The prepacked blob, read byte by byte as csrc/engine.h specifies it, by none of the engine's own code.

Both layouts of every layer must hold each kept weight once, in its place and in its order, and nothing else.
"""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from kernels.networks import (
    MaskedLayer,
    Task,
    prepack,
    random_layer,
    random_mask,
    random_task,
    rounded_to_bf16,
    steps_of,
    steps_of_firsts,
)
from numpy.typing import NDArray
from torch import Tensor

from lt4rec_sparse.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=f"no native engine: {cpu.absence_reason()}")

Array = NDArray[Any]

HEADER = struct.Struct("<2I11Q10I")
RECORD = struct.Struct("<7Ifif2I19Q")
BLOCK_FEATURES, SLICE_ROWS, GROUP, BUNDLE, ALIGNMENT = 128, 4, 16, 4, 64
LINEAR, SHARED, COMBINED = range(3)
ACTIVATIONS = {
    "none": 0,
    "relu": 1,
    "sigmoid": 2,
    "tanh": 3,
    "silu": 4,
    "gelu": 5,
    "gelu_tanh": 6,
    "hardswish": 7,
    "leaky_relu": 8,
    "elu": 9,
    "dice": 10,
}
PRECISIONS = ("fp32", "bf16", "int8")
LAYOUTS = {"tables": 1, "slices": 2, "filled": 8}


class Header(NamedTuple):
    magic: int
    version: int
    bytes: int
    slice_bytes: int
    table_bytes: int
    block_bytes: int
    nnz: int
    multiply_adds: int
    slice_multiply_adds: int
    table_multiply_adds: int
    block_multiply_adds: int
    filled_multiply_adds: int
    largest_sum: int
    precision: int
    in_features: int
    outputs: int
    tasks: int
    layers: int
    hidden_features: int
    shared_features: int
    layouts: int
    bias_features: int
    unused: int


class Record(NamedTuple):
    kind: int
    in_features: int
    out_features: int
    activation: int
    is_head: int
    part_count: int
    part_features: int
    inverse_scale: float
    zero_point: int
    slope: float
    takes_bias: int
    bias_column: int
    bias_order: int
    bias: int
    parts: int
    block_slices: int
    slices: int
    steps: int
    slice_bias: int
    bundle_steps: int
    windows: int
    indices: int
    weights: int
    block_groups: int
    group_blocks: int
    block_quads: int
    block_weights: int
    scale: int
    start: int
    signed_start: int
    slopes: int


class Table(NamedTuple):
    """How a precision's tables look."""

    places: int  # of each feature in a step
    window: int
    dtype: str  # of the weights as stored
    gap: int  # features between two zeros; 0: no zeros, but windows one after the other, which overlap by a half

    def feature_at(self, window: int, index: int) -> int | None:
        """Return the feature at a place of a window; None where a zero stands."""
        if self.gap == 0:
            assert window % self.window == 0
            return window // 2 + index
        position = window + index
        return None if position % (self.gap + 1) == 0 else position - position // (self.gap + 1) - 1

    def last_window(self, features: int) -> int:
        """Return where the last window begins that holds an activation: a line goes on for a whole window."""
        if self.gap == 0:
            return (features - 1) // (self.window // 2) * self.window
        return features - 1 + (features - 1) // self.gap + 1


TABLES = {"fp32": Table(1, 32, "<f4", 16), "bf16": Table(2, 64, "<u2", 32), "int8": Table(4, 64, "i1", 0)}
SLICE_STEPS = {
    "fp32": np.dtype([("offsets", "<u8", (1,)), ("weight", "<f4", (SLICE_ROWS, 1))]),
    "bf16": np.dtype([("offsets", "<u8", (2,)), ("weight", "<u2", (SLICE_ROWS, 2))]),
}
SLICE_STEPS["int8"] = SLICE_STEPS["fp32"]  # of quantised weights
SLICE = np.dtype([("steps", "<u4"), ("row", "<u4", (SLICE_ROWS,))])


class Weights:
    """What a layout holds: the columns of each row in the order of the blob, and their weights."""

    def __init__(self, rows: int, columns: int, dtype: str) -> None:
        self.columns: list[list[int]] = [[] for _ in range(rows)]
        self.dense = np.zeros((rows, columns), dtype)
        self.multiply_adds = 0  # padding included

    def put(self, row: int, column: int, weight: Any) -> None:
        self.columns[row].append(column)
        self.dense[row, column] = weight


class Blob:
    """A blob, its header and records unpacked; notes every section that is read."""

    def __init__(self, tensor: Tensor) -> None:
        self.bytes = tensor.numpy()
        self.header = Header(*HEADER.unpack_from(self.bytes))
        self.precision = PRECISIONS[self.header.precision]
        end_of_records = HEADER.size + self.header.layers * RECORD.size
        records = self.bytes[HEADER.size : end_of_records].tobytes()
        self.records = [Record(*fields) for fields in RECORD.iter_unpack(records)]
        self.sections = {(0, end_of_records, "head")}

    def section(self, at: int, dtype: Any, count: int, kind: str = "") -> Array:
        dtype = np.dtype(dtype)
        self.sections.add((at, at + count * dtype.itemsize, kind))
        return np.frombuffer(self.bytes, dtype, count, at)

    def parts(self, record: Record) -> tuple[int, ...]:
        """Read which parts a combined layer adds, in their order."""
        return tuple(self.section(record.parts, "<u4", record.part_count).tolist()) if record.part_count else ()

    def part_sets(self) -> list[set[int]]:
        """Tell the tasks of each part from what their combined layers add."""
        combined = [self.parts(record) for record in self.records if record.kind == COMBINED]
        parts = range(1 + max(itertools.chain(*combined), default=-1))
        return [{t for t, of_task in enumerate(combined) if part in of_task} for part in parts]

    def slices(self, record: Record) -> tuple[Weights, Array]:
        """Read the weights, and each row's bias."""
        steps_dtype = SLICE_STEPS[self.precision]
        held = Weights(record.out_features, record.in_features, steps_dtype["weight"].base.str)
        bias = np.full(record.out_features, np.nan, "<f4")
        blocks = blocks_of(record.in_features)
        block_slices = self.section(record.block_slices, "<u4", blocks, "slice").tolist()
        slices = self.section(record.slices, SLICE, sum(block_slices), "slice")
        steps = self.section(record.steps, steps_dtype, int(slices["steps"].sum()), "slice")
        slice_bias = self.section(record.slice_bias, "<f4", SLICE_ROWS * block_slices[0], "slice")
        held.multiply_adds = steps["weight"].size
        at_slice = at_step = 0
        for block, count in enumerate(block_slices):
            named = []
            for piece in slices[at_slice : at_slice + count]:
                for r, tile_row in enumerate(piece["row"].tolist()):
                    row = None if tile_row == 0 else feature_of_tile_row(tile_row)
                    named += [] if row is None else [row]
                    length = self._slice_row(held, steps[at_step : at_step + piece["steps"]], r, row, block)
                    assert r > 0 or int(piece["steps"]) - 1 < length, "a slice's first row is its longest"
                at_step += int(piece["steps"])
            if block == 0:
                rows = [int(r) for r in slices["row"][:count].ravel()]
                for tile_row, value in zip(rows, slice_bias, strict=True):
                    if tile_row == 0:
                        assert value == 0, "a missing row has no bias"
                    else:
                        bias[feature_of_tile_row(tile_row)] = value
            assert len(set(named)) == len(named), "a block names a row once"
            if block in (0, blocks - 1):
                assert sorted(named) == list(range(record.out_features)), "the first and the last block name every row"
            at_slice += count
        return held, bias

    def _slice_row(self, held: Weights, steps: Array, r: int, row: int | None, block: int) -> float:
        """Read row `r` of a slice within one block; return how many steps its kept weights take."""
        kept = 0
        for position, (step, half) in enumerate(itertools.product(steps, reversed(range(steps["offsets"].shape[1])))):
            offset, weight = int(step["offsets"][half]) >> (16 * r) & 0xFFFF, step["weight"][r, half]
            assert offset % 64 == 0
            if offset == 0:  # the row of zeros
                assert is_zero(weight)
                continue
            assert row is not None, "a missing row has only padding"
            assert position == kept, "padding stands behind the kept weights"
            kept += 1
            held.put(row, block * BLOCK_FEATURES + offset // 64 - 1, weight)
        return kept / steps["offsets"].shape[1]

    def tables(self, record: Record) -> Weights:
        table = TABLES[self.precision]
        held = Weights(padded(record.out_features), record.in_features, table.dtype)
        groups = padded(record.out_features) // GROUP
        bundles = [range(g, g + BUNDLE) for g in range(0, groups - BUNDLE + 1, BUNDLE)]
        bundles += [range(g, g + 1) for g in range(len(bundles) * BUNDLE, groups)]
        bundle_steps = self.section(record.bundle_steps, "<u4", len(bundles), "table")
        elements = sum(int(steps) * len(bundle) for steps, bundle in zip(bundle_steps, bundles, strict=True))
        windows = self.section(record.windows, "<u4", elements, "table")
        shape = (elements, GROUP, table.places)
        indices = self.section(record.indices, "u1", elements * GROUP * table.places, "table").reshape(shape)
        weights = self.section(record.weights, table.dtype, elements * GROUP * table.places, "table").reshape(shape)
        held.multiply_adds = weights.size
        groups_in_turn = [
            group
            for steps, bundle in zip(bundle_steps, bundles, strict=True)
            for _ in range(int(steps))
            for group in bundle
        ]
        for at, (group, window) in enumerate(zip(groups_in_turn, windows.tolist(), strict=True)):
            assert window <= table.last_window(record.in_features)
            for feature, place in itertools.product(range(GROUP), reversed(range(table.places))):
                index, weight = int(indices[at, feature, place]), weights[at, feature, place]
                assert index < table.window
                column = table.feature_at(window, index)
                if column is None:  # a zero, the last of which stands behind the last activation
                    assert is_zero(weight)
                    assert window + index <= table.last_window(record.in_features) + table.gap
                elif table.gap > 0 or weight != 0:
                    held.put(group * GROUP + feature, column, weight)
        return held


def blocks_of(features: int) -> int:
    return -(-features // BLOCK_FEATURES)


def padded(features: int) -> int:
    return -(-features // GROUP) * GROUP


def feature_of_tile_row(row: int) -> int:
    assert row % (BLOCK_FEATURES + 1) != 0, "a row of zeros"
    return row - row // (BLOCK_FEATURES + 1) - 1


def is_zero(weight: Any) -> bool:
    """0 or -0, also as the bits of a bfloat16."""
    return bool(weight & 0x7FFF == 0 if isinstance(weight, np.uint16) else weight == 0)


def read_blocks(blob: Blob, record, precision: str) -> tuple[np.ndarray, int]:
    """Return the weights, dense and whole groups of them, and how many are stored; check order and padding."""
    dtype = {"fp32": "<f4", "bf16": "<u2", "int8": "i1"}[precision]
    shape = {"fp32": (4, 16), "bf16": (2, 16, 2), "int8": (16, 4)}[precision]
    groups, quads = padded(record.out_features) // 16, -(-record.in_features // 4)
    panel_quads = 512 if precision == "int8" else 128
    panels = -(-quads // panel_quads)
    order = blob.section(record.block_groups, "<u4", panels * groups, "block").reshape(panels, groups)
    begins = blob.section(record.group_blocks, "<u4", panels * (groups + 1), "block").reshape(panels, groups + 1)
    blocks = int(begins[-1, -1])
    of_block = blob.section(record.block_quads, "<u4", blocks, "block")
    weights = blob.section(record.block_weights, dtype, blocks * 64, "block").reshape(blocks, *shape)
    inputs = {"fp32": lambda b: b, "bf16": lambda b: b.transpose(0, 2, 1).reshape(4, 16), "int8": lambda b: b.T}
    dense = np.zeros((groups * 16, quads * 4), dtype)
    previous = 0
    for panel in range(panels):
        assert begins[panel, 0] == previous
        assert sorted(order[panel]) == list(range(groups))
        counts = np.diff(begins[panel].astype(int))
        assert (np.diff(counts) <= 0).all(), "descending"
        for group, first, past in zip(order[panel].tolist(), begins[panel], begins[panel, 1:], strict=False):
            assert (np.diff(of_block[first:past].astype(int)) > 0).all()
            for quad, block in zip(of_block[first:past].tolist(), weights[first:past], strict=True):
                assert quad // panel_quads == panel
                dense[16 * group : 16 * group + 16, 4 * quad : 4 * quad + 4] = inputs[precision](block).T
        previous = begins[panel, -1]
    assert not dense[:, record.in_features :].any()
    return dense, blocks * 64


class Expected(NamedTuple):
    """A layer in the order of the blob."""

    kind: int
    weight: Tensor  # [out_features, in_features], 0 where pruned; none in a combined layer
    mask: Tensor
    bias: Tensor | None
    layer: MaskedLayer  # whose activation and quantisation parameters it has
    steps: Tensor  # of each row's weights in int8; of a part's rows, where parts repeat them
    is_head: bool
    parts: tuple[int, ...] = ()


def arranged(tasks: Sequence[Task], sets: Sequence[set[int]]) -> Iterator[Expected]:
    """The layers in the order of the records, features of all but inputs and heads by descending kept weights.

    `sets` are the tasks of each part: where there are parts, all first layers are one weight. A part holds what all of
    its tasks keep and no earlier part has brought to any of them.
    """
    in_place = torch.arange(tasks[0][0].mask.shape[1])
    steps_of_tasks = steps_of_firsts(tasks)
    shared_rows = in_place
    if sets:
        firsts = [task[0] for task in tasks]
        kept = torch.stack([first.mask.sum(dim=1) for first in firsts]).sum(dim=0)
        has_head = any(len(task) == 1 for task in tasks)
        shared_rows = torch.arange(len(kept)) if has_head else kept.argsort(descending=True, stable=True)
        missing = torch.stack([first.mask for first in firsts])
        masks, weights = [], []
        for of_part in map(sorted, sets):
            masks.append(missing[of_part].all(dim=0))
            weights.append(torch.where(masks[-1], firsts[of_part[0]].weight, 0.0))
            missing[of_part] &= ~masks[-1]
        assert not missing.any(), "a task's parts bring all that it keeps"
        yield Expected(
            SHARED,
            torch.cat([grown(weight[shared_rows]) for weight in weights]),
            torch.cat([grown(mask[shared_rows]) for mask in masks]),
            None,
            firsts[0]._replace(activation="none"),
            grown(steps_of_tasks[0][shared_rows]),
            False,
        )
    for t, task in enumerate(tasks):
        columns = in_place
        for i, layer in enumerate(task):
            is_head = i == len(task) - 1
            kept = layer.mask.sum(dim=1)
            rows = torch.arange(len(kept)) if is_head else kept.argsort(descending=True, stable=True)
            steps = steps_of(layer.weight) if i else steps_of_tasks[t]
            if sets and i == 0:
                rows = shared_rows
                nothing = torch.zeros(len(rows), 0)
                parts = tuple(part for part, of_part in enumerate(sets) if t in of_part)
                yield Expected(
                    COMBINED, nothing, nothing.bool(), chosen(layer.bias, rows), layer, steps[rows], is_head, parts
                )
            else:
                weight, mask = layer.weight[rows][:, columns], layer.mask[rows][:, columns]
                weight = torch.where(mask, weight, 0.0)
                yield Expected(LINEAR, weight, mask, chosen(layer.bias, rows), layer, steps[rows], is_head)
            columns = rows


def grown(rows: Tensor) -> Tensor:
    """Whole groups of rows."""
    return torch.cat([rows, rows.new_zeros(padded(len(rows)) - len(rows), *rows.shape[1:])])


def chosen(bias: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if bias is None else bias[rows]


def as_stored(weight: Tensor, precision: str) -> Array:
    if precision == "bf16":
        return (rounded_to_bf16(weight).view(torch.int32) >> 16).short().numpy().view("<u2")
    return weight.numpy()


# How many columns these tasks alone keep; those of ac are too few for a part.
PAIR_COLUMNS = {"abc": 60, "ab": 36, "bc": 34, "ac": 6, "a": 4, "b": 5, "c": 5}
# The tasks of each part.
PART_SETS = {
    "shared": [{0, 1}, {0}, {1}],
    "shared heads": [{0, 1, 2}, {0}, {1}, {2}],
    "shared in pairs": [{0, 1, 2}, {0, 1}, {1, 2}, {0}, {1}, {2}],
}


@functools.cache
def networks() -> dict[str, list[Task]]:
    """Every kind of layer, and sizes around every boundary."""
    common = random_mask(40, 150, 0.3, seed=5)
    of_all = random_layer(torch.ones_like(common), "relu", seed=6, integers=False)

    def kept(mask: Tensor, t: int) -> MaskedLayer:
        return of_all._replace(weight=of_all.weight * mask, mask=mask, bias=torch.arange(40.0) + t)

    def first(t: int) -> MaskedLayer:
        return kept(common | random_mask(40, 150, 0.2, seed=7 + t), t)

    owners = torch.arange(len(PAIR_COLUMNS)).repeat_interleave(torch.tensor(list(PAIR_COLUMNS.values())))
    pairs = [torch.tensor([task in names for names in PAIR_COLUMNS])[owners] for task in "abc"]
    zeros = random_layer(random_mask(70, 140, 0.5, seed=1), "none", seed=2)
    return {
        "one weight": [[random_layer(torch.ones(1, 1, dtype=torch.bool), "none", seed=1)]],
        "deep": [random_task((300, 140, 66, 17, 1), 0.25, seed=1, head="sigmoid", integers=False)],
        "several": [random_task((33, 20, 3), 0.5, seed=1), random_task((33, 64), 0.5, seed=9)],
        "dead": [[random_layer(torch.zeros(5, 260, dtype=torch.bool), "relu", seed=1)]],
        "full": [random_task((129, 130, 2), 1.0, seed=1, integers=False)],
        "no bias": [[random_layer(random_mask(18, 40, 0.4, seed=2), "relu", seed=3, bias=False)]],
        "kept zeros": [[zeros._replace(weight=zeros.weight * random_mask(70, 140, 0.5, seed=3))]],
        "shared": [[first(0), *random_task((40, 20, 3), 0.4, seed=3)], [first(1), *random_task((40, 6), 0.4, seed=4)]],
        "shared heads": [[first(0), *random_task((40, 7), 0.4, seed=3)], [first(1)], [first(2)]],
        "shared in pairs": [
            [kept(columns.expand(40, 150), t), *random_task((40, 5), 0.4, seed=t)] for t, columns in enumerate(pairs)
        ],
        "shared by many": [[kept(common & random_mask(40, 150, 0.98, seed=t), t)] for t in range(10)],
        "little in common": [[kept(random_mask(40, 150, 0.1, seed=20 + t), t)] for t in range(3)],
    } | {f"{i} x {o}": [random_task((i, o, 2), 0.4, seed=i + o)] for i in (15, 17, 32, 65, 128) for o in (4, 16, 81)}


@functools.cache
def packed(name: str, precision: str) -> tuple[Blob, list[Expected]]:
    blob = Blob(prepack(networks()[name], precision))
    return blob, list(arranged(networks()[name], blob.part_sets()))


of_every_network = pytest.mark.parametrize(
    ("name", "precision"), list(itertools.product(networks(), PRECISIONS)), ids=str
)


@of_every_network
def test_the_header_says_what_was_packed(name: str, precision: str) -> None:
    tasks = networks()[name]
    blob, layers = packed(name, precision)
    header = blob.header
    parts = [layer for layer in layers if layer.kind == SHARED]
    assert bool(parts) == name.startswith("shared")
    assert (header.magic, header.version) == (int.from_bytes(b"T3RS", "little"), 10)
    assert header.layouts == sum(LAYOUTS.values()) - (LAYOUTS["filled"] if precision == "int8" else 0)
    largest = 0
    for layer in layers if precision == "int8" else ():
        if layer.kind != COMBINED:  # of all parts together
            sums = quantized(layer).int().abs().sum(dim=1).view(-1, len(layer.steps)).sum(dim=0)
            largest = max(largest, int(sums.max()))
    assert header.largest_sum == 255 * largest
    assert header.bytes == len(blob.bytes)
    assert header.bytes % ALIGNMENT == 0
    assert header.nnz == sum(int(layer.mask.sum()) for task in tasks for layer in task)
    assert header.multiply_adds == sum(int(layer.mask.sum()) for layer in layers)
    assert PRECISIONS[header.precision] == precision
    assert header.in_features == tasks[0][0].mask.shape[1]
    assert header.outputs == sum(len(task[-1].mask) for task in tasks)
    assert (header.tasks, header.layers) == (len(tasks), len(layers))
    assert header.hidden_features == max(padded(len(layer.mask)) for task in tasks for layer in task)
    assert header.shared_features == (len(parts[0].mask) if parts else 0)


@of_every_network
def test_each_task_adds_shared_parts_and_then_its_own(name: str, precision: str) -> None:
    blob, _ = packed(name, precision)
    sets = blob.part_sets()
    assert sets == PART_SETS.get(name, sets)
    if not sets:
        assert not name.startswith("shared")
        return
    tasks = len(networks()[name])
    shared = sets[:-tasks]
    assert 1 <= len(shared) <= 8
    assert all(len(of_part) > 1 for of_part in shared)
    assert sets[-tasks:] == [{t} for t in range(tasks)]
    assert len({frozenset(of_part) for of_part in sets}) == len(sets)


@of_every_network
def test_the_records_say_what_was_packed(name: str, precision: str) -> None:
    blob, layers = packed(name, precision)
    for record, expected in zip(blob.records, layers, strict=True):
        out_features = (
            len(expected.bias) if expected.kind == COMBINED and expected.bias is not None else len(expected.mask)
        )
        part_features = blob.header.shared_features // len(blob.part_sets()) if expected.kind != LINEAR else 0
        assert (record.kind, record.out_features, record.is_head) == (expected.kind, out_features, expected.is_head)
        assert (blob.parts(record), record.part_features) == (expected.parts, part_features)
        assert (record.parts > 0) == (expected.kind == COMBINED)
        assert record.in_features == expected.layer.mask.shape[1]
        assert record.activation == ACTIVATIONS[expected.layer.activation]
        # Quantisation parameters mean something in int8 alone, and travel in every precision.
        assert record.inverse_scale == torch.tensor(1 / expected.layer.input_scale, dtype=torch.float32).item()
        assert record.zero_point == expected.layer.input_zero_point
        assert record.slope == torch.tensor(expected.layer.slope).item()
        assert record.slopes == 0


@of_every_network
def test_all_layouts_hold_each_kept_weight_once_and_in_order(name: str, precision: str) -> None:
    blob, layers = packed(name, precision)
    for record, expected in zip(blob.records, layers, strict=True):
        if expected.kind == COMBINED:
            sections = (*record[record._fields.index("block_slices") : record._fields.index("scale")], record.start)
            assert not any(sections), "a combined layer has no weights"
            continue
        rows = [row.nonzero().flatten().tolist() for row in expected.mask]
        table = blob.tables(record)
        if precision == "int8":
            weight = quantized(expected)
            assert np.array_equal(table.dense[: len(rows)], weight.numpy())
            assert all(columns == sorted(columns) for columns in table.columns)
            slices, start = blob.slices(record)
            assert slices.columns == rows
            assert np.array_equal(slices.dense, weight.float().numpy())
            assert np.array_equal(start, -expected.layer.input_zero_point * weight.sum(dim=1, dtype=torch.int32))
        else:
            weight = as_stored(expected.weight, precision)
            slices, bias = blob.slices(record)
            assert slices.columns == rows
            assert table.columns == rows + [[]] * (len(table.columns) - len(rows))
            assert np.array_equal(bits_of(slices.dense), bits_of(weight))
            assert np.array_equal(bits_of(table.dense[: len(rows)]), bits_of(weight))
            assert np.array_equal(bias, (torch.zeros(len(rows)) if expected.bias is None else expected.bias).numpy())
            filled, _ = read_blocks(blob, record, "fp32")
            assert np.array_equal(bits_of(filled), bits_of(filled_blocks(expected, precision)))


@of_every_network
def test_biases_scales_and_starts_are_padded_with_zeros(name: str, precision: str) -> None:
    blob, layers = packed(name, precision)
    for record, expected in zip(blob.records, layers, strict=True):
        whole = padded(record.out_features)
        bias = torch.zeros(whole)
        if expected.bias is not None:
            bias[: record.out_features] = expected.bias
        assert np.array_equal(blob.section(record.bias, "<f4", whole), bias.numpy())
        if precision != "int8":
            assert (record.scale, record.start, record.signed_start) == (0, 0, 0)
            continue
        if expected.kind != COMBINED:
            weight = quantized(expected)
            sums = torch.zeros(whole, dtype=torch.int32)
            sums[: len(weight)] = weight.sum(dim=1, dtype=torch.int32)
            for at, zero in ((record.start, 0), (record.signed_start, 128)):
                start = (zero - expected.layer.input_zero_point) * sums
                assert np.array_equal(blob.section(at, "<i4", whole), start.numpy())
        if expected.kind == SHARED:
            assert record.scale == 0
            continue
        scale = torch.zeros(whole)
        scale[: record.out_features] = (expected.steps.double() * expected.layer.input_scale).float()
        assert np.array_equal(blob.section(record.scale, "<f4", whole), scale.numpy())


def quantized(expected: Expected) -> Tensor:
    """A layer's weights as int8."""
    step = expected.steps.repeat(len(expected.weight) // len(expected.steps))[:, None]
    return torch.where(step > 0, (expected.weight / step).round(), 0.0).to(torch.int8)


def filled_blocks(expected: Expected, precision: str) -> Array:
    """A layer in whole groups and quads: where a block has a kept weight, -0 for what is pruned."""
    rows, columns = expected.mask.shape
    whole = torch.zeros(padded(rows), -(-columns // 4) * 4, dtype=torch.bool)
    whole[:rows, :columns] = expected.mask
    in_blocks = whole.view(len(whole) // 16, 16, -1, 4)
    touched = in_blocks.any(dim=3, keepdim=True).any(dim=1, keepdim=True).expand_as(in_blocks).reshape_as(whole)
    filled = torch.where(touched, -0.0, 0.0)
    kept = expected.weight[expected.mask]
    filled[whole] = (rounded_to_bf16(kept) if precision == "bf16" else kept) + 0.0  # no kept weight is -0
    return filled.numpy()


def bits_of(weight: Array) -> Array:
    """To tell -0 from 0."""
    return np.ascontiguousarray(weight).view(f"<u{weight.itemsize}")


@pytest.mark.parametrize("layouts", (cpu.UNSTRUCTURED, ("tables",), ("slices",), ("filled",)), ids="-".join)
@of_every_network
def test_sections_are_aligned_and_fill_the_blob(name: str, precision: str, layouts: tuple[str, ...]) -> None:
    blob = Blob(prepack(networks()[name], precision, layouts))
    if precision == "int8":
        layouts = tuple(layout for layout in layouts if layout != "filled") or ("tables",)
    assert blob.header.layouts == sum(LAYOUTS[layout] for layout in layouts)
    multiply_adds = dict.fromkeys(LAYOUTS, 0)
    for record in blob.records:
        blob.parts(record)
        blob.section(record.bias, "<f4", padded(record.out_features))
        if precision == "int8" and record.kind != SHARED:
            blob.section(record.scale, "<f4", padded(record.out_features))
        if precision == "int8" and record.kind != COMBINED:
            blob.section(record.start, "<i4", padded(record.out_features))
            blob.section(record.signed_start, "<i4", padded(record.out_features))
        of_slices = (record.block_slices, record.slices, record.steps, record.slice_bias)
        of_tables = (record.bundle_steps, record.windows, record.indices, record.weights)
        of_blocks = (record.block_groups, record.group_blocks, record.block_quads, record.block_weights)
        if record.kind != COMBINED and "tables" in layouts:
            multiply_adds["tables"] += blob.tables(record).multiply_adds
        else:
            assert not any(of_tables)
        if record.kind != COMBINED and "slices" in layouts:
            multiply_adds["slices"] += blob.slices(record)[0].multiply_adds
        else:
            assert not any(of_slices)
        if record.kind != COMBINED and "filled" in layouts:
            multiply_adds["filled"] += read_blocks(blob, record, "fp32")[1]
        else:
            assert not any(of_blocks)
    header = blob.header
    assert multiply_adds == {
        "tables": header.table_multiply_adds,
        "slices": header.slice_multiply_adds,
        "filled": header.block_multiply_adds,
    }
    if "filled" in layouts:
        assert header.filled_multiply_adds == header.block_multiply_adds
    end = 0
    sizes = dict.fromkeys(("slice", "table", "block", "head", ""), 0)
    for first, past, kind in sorted(blob.sections):
        assert first % ALIGNMENT == 0
        assert first == -(-end // ALIGNMENT) * ALIGNMENT, "a section begins where the one before it ends"
        assert not blob.bytes[end:first].any(), "zeros fill the gap between two sections"
        sizes[kind] += -(-(past - first) // ALIGNMENT) * ALIGNMENT
        end = past
    assert len(blob.bytes) == -(-end // ALIGNMENT) * ALIGNMENT
    assert not blob.bytes[end:].any()
    assert (header.slice_bytes, header.table_bytes) == (sizes["slice"], sizes["table"])
    assert header.block_bytes == sizes["block"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_describe_reads_the_header(precision: str) -> None:
    blob, _ = packed("shared", precision)
    header = blob.header
    assert cpu.describe(torch.from_numpy(blob.bytes)) == (
        precision,
        ("tables", "slices") if precision == "int8" else cpu.UNSTRUCTURED,
        header.in_features,
        header.outputs,
        header.tasks,
        header.layers,
        header.bias_features,
        header.nnz,
        header.multiply_adds,
        header.slice_multiply_adds,
        header.table_multiply_adds,
        header.block_multiply_adds,
        header.filled_multiply_adds,
        header.bytes,
        header.slice_bytes,
        header.table_bytes,
        header.block_bytes,
    )
