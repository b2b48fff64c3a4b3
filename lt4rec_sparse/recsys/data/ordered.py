"""The rows of a day in order and without duplicates, however many they are.

A day that is larger than `PIECE_BYTES` is cut to pieces on disk. Cuts of the column that orders rows leave pieces that
are sorted one after another; rows that are equal are in one of them. What cannot be cut so, rows of one moment and days
without an order, stays in the order of the files, and is dealt by a hash of the rows to find the first of equal ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lt4rec_sparse.files import scratch_beside
from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.ranker.features.tables import hash64
from lt4rec_sparse.recsys.data.casts import is_list, is_text
from lt4rec_sparse.recsys.data.dealt import Dealing, Dealt

POSITION = "__position__"
# Sorting and comparing rows takes about four times as much.
PIECE_BYTES = 128 << 20
MOST_PIECES = 256  # each keeps a file open
SAMPLES = 1 << 20  # of the column that orders rows


def ordered(rows: Dealt, schema: Schema, names: Sequence[str], scratch: Path) -> Iterator[Any]:
    """Yield the rows of a day as tables, sorted as the schema says, and without later ones of equal rows if it says so.

    Args:
        rows: The day.
        schema: That of the log.
        names: The columns in which equal rows are equal.
        scratch: A path that is free, for temporary files of the size of the day.
    """
    order, drops = schema.order, schema.duplicates == "drop"
    if order is None and not drops:
        yield from map(_as_table, rows.read())
    elif rows.nbytes <= PIECE_BYTES:
        table = pa.Table.from_batches(rows.read())
        if drops:
            table = _distinct(table, names)
        if order is not None:  # stable: rows at the same moment keep the order of the files
            table = table.take(np.argsort(table[order].to_numpy(), kind="stable"))
        yield table
    elif order is None:
        yield from _first_of_equals(rows, names, scratch)
    else:
        with scratch_beside(scratch) as folder:
            for place, (piece, is_of_one_moment) in enumerate(_by_range(rows, order, folder)):
                below = folder / f"piece-{place}"
                if not is_of_one_moment:
                    yield from ordered(piece, schema, names, below)
                elif drops:
                    yield from _first_of_equals(piece, names, below)
                else:
                    yield from map(_as_table, piece.read())
                piece.remove()


def in_chunks(tables: Iterator[Any], rows: int) -> Iterator[Any]:
    """Yield the same rows as tables in one chunk each, of as many rows but for the last one."""
    held: list[Any] = []
    count = 0
    for table in tables:
        held.append(table)
        count += table.num_rows
        if count >= rows:
            whole = pa.concat_tables(held)
            ready = count - count % rows
            for first in range(0, ready, rows):
                yield whole.slice(first, rows).combine_chunks()
            # A slice would hold the whole table.
            held, count = [whole.slice(ready).combine_chunks()], count - ready
    if count:
        yield pa.concat_tables(held).combine_chunks()


def _by_range(rows: Dealt, order: str, folder: Path) -> Iterator[tuple[Dealt, bool]]:
    """Yield ascending pieces of the rows, and whether all rows of a piece are of one moment."""
    cuts = _cuts(rows, order)
    with Dealing(folder) as dealing:
        for batch in rows.read():
            moments = batch[order].to_numpy(zero_copy_only=False)
            # Odd places are on a cut, even ones between two; missing moments are last, as sorting has them.
            places = np.searchsorted(cuts, moments, "left") + np.searchsorted(cuts, moments, "right")
            places[np.isnan(moments)] = 2 * len(cuts) + 1
            _deal(dealing, batch, places)
    for place, piece in sorted(dealing.dealt().items()):
        yield piece, place % 2 == 1


def _cuts(rows: Dealt, order: str) -> NDArray[Any]:
    """Return some of the moments of the rows, ascending, with about as many rows between any two."""
    step = -(-rows.rows // SAMPLES)
    sampled, done, present = [], 0, np.empty(0)
    for batch in rows.read([order]):
        found = batch[order].to_numpy(zero_copy_only=False)
        sampled.append(found[-done % step :: step])
        if not len(present):
            present = found[~np.isnan(found)][:1]
        done += batch.num_rows
    moments = np.sort(np.concatenate(sampled))
    moments = moments[~np.isnan(moments)]
    if not len(moments):
        return present  # one cut tells all that is missing from the few that are not
    # A second piece for each that the bytes ask for: they are not of one size.
    count = min(2 * -(-rows.nbytes // PIECE_BYTES), MOST_PIECES // 2)
    return np.unique(moments[len(moments) * np.arange(1, count) // count])


def _first_of_equals(rows: Dealt, names: Sequence[str], scratch: Path) -> Iterator[Any]:
    """Yield the rows in their order without those that equal an earlier one; memory holds a byte per row."""
    kept = np.zeros(rows.rows, np.bool_)
    pieces = min(-(-rows.nbytes // PIECE_BYTES), MOST_PIECES)
    with scratch_beside(scratch) as folder:
        with Dealing(folder) as dealing:
            done = 0
            for batch in rows.read():
                positions = pa.array(np.arange(done, done + batch.num_rows))
                places = (_hashed(batch, names) % np.uint64(pieces)).astype(np.int64)
                _deal(dealing, batch.append_column(POSITION, positions), places)
                done += batch.num_rows
        for piece in dealing.dealt().values():
            first = None
            for table in _of_bytes(piece):
                first = _distinct(table if first is None else pa.concat_tables([first, table]), names)
            if first is not None:
                kept[first[POSITION].to_numpy()] = True
            piece.remove()
    done = 0
    for batch in rows.read():
        yield _as_table(batch.filter(pa.array(kept[done : done + batch.num_rows])))
        done += batch.num_rows


def _of_bytes(rows: Dealt) -> Iterator[Any]:
    """Yield rows as tables of about `PIECE_BYTES`."""
    held: list[Any] = []
    nbytes = 0
    for batch in rows.read():
        held.append(batch)
        nbytes += batch.nbytes
        if nbytes >= PIECE_BYTES:
            yield pa.Table.from_batches(held)
            held, nbytes = [], 0
    if held:
        yield pa.Table.from_batches(held)


def _deal(dealing: Dealing, batch: Any, places: NDArray[np.int64]) -> None:
    """Write each row to its place; rows keep their order."""
    order = np.argsort(places, kind="stable")
    batch, places = batch.take(pa.array(order)), places[order]
    firsts = np.flatnonzero(np.r_[True, places[1:] != places[:-1]][: len(places)])
    for first, last in zip(firsts, [*firsts[1:], len(places)], strict=True):
        dealing.write(int(places[first]), batch.slice(first, last - first))


def _hashed(batch: Any, names: Sequence[str]) -> NDArray[np.uint64]:
    """Return a hash of each row, the same of equal rows; of numbers, times and texts alone."""
    mixed = np.zeros(batch.num_rows, np.uint64)
    for name in names:
        column = batch[name]
        if is_text(column.type) or (pa.types.is_primitive(column.type) and not pa.types.is_interval(column.type)):
            mixed = hash64((mixed ^ _bits(column)).view(np.int64))
    return mixed


def _bits(column: Any) -> NDArray[np.uint64]:
    """Return 64 bits of each value, which differ where values do."""
    if pa.types.is_integer(column.type):
        values = column.fill_null(0).cast(pa.int64(), safe=False)
    elif pa.types.is_float64(column.type):
        values = column.fill_null(0.0)
    else:
        coded = column.cast(pa.string()).dictionary_encode()
        of_texts = hash64(coded.dictionary.to_numpy(zero_copy_only=False).astype(object))
        values = pa.array(of_texts.view(np.int64)).take(coded.indices).fill_null(0)
    bits: NDArray[np.uint64] = values.to_numpy().view(np.uint64)
    return bits


def _as_table(batch: Any) -> Any:
    return pa.Table.from_batches([batch])


def _distinct(table: Any, names: Sequence[str]) -> Any:
    """Return rows without those that equal an earlier one in the named columns."""
    keys = table.select(list(names)).append_column(POSITION, pa.array(np.arange(table.num_rows)))
    for place, name in enumerate(names):
        if is_list(table[name].type):  # Arrow does not group by lists: they become text
            text = pc.binary_join(table[name].cast(pa.list_(pa.string())), "\x1f")
            keys = keys.set_column(place, name, text)
    first = keys.group_by(list(names)).aggregate([(POSITION, "min")])[f"{POSITION}_min"]
    return table.take(np.sort(first.to_numpy()))
