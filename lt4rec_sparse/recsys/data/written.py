"""Tables written to CSV or Parquet: the file's name says which; files are whole or absent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from lt4rec_sparse.errors import InputError, shown
from lt4rec_sparse.files import whole_file
from lt4rec_sparse.ranker.features import Column, Schema
from lt4rec_sparse.recsys.data.reading import missing_texts

WRITERS = {".csv": pyarrow.csv.CSVWriter, ".parquet": pq.ParquetWriter}


def check_table_name(out: Path) -> None:
    """Refuse a file whose name says neither CSV nor Parquet.

    Raises:
        InputError: If it ends in neither .csv nor .parquet.
    """
    if out.suffix not in WRITERS:
        raise InputError(f"OUT: got {out.name!r}, wanted a name that ends in .csv or .parquet")


def check_flat(out: Path, lists: Iterable[str]) -> None:
    """Refuse columns of lists, by name, in a file of CSV.

    Raises:
        InputError: If there is one.
    """
    name = next(iter(lists), None)
    if out.suffix == ".csv" and name is not None:
        raise InputError(f"column {name!r}: got lists, wanted an OUT that ends in .parquet for them")


@contextmanager
def written_table(out: Path) -> Iterator[Callable[[Any], None]]:
    """Give a function that appends a `pyarrow.Table` to the file; it has the columns of the first one.

    Raises:
        InputError: If the name is not that of a table, or CSV is to hold lists.
    """
    check_table_name(out)
    with whole_file(out) as temporary, ExitStack() as stack:
        writer: Any = None

        def append(table: Any) -> None:
            nonlocal writer
            if writer is None:
                check_flat(out, (field.name for field in table.schema if pa.types.is_nested(field.type)))
                writer = stack.enter_context(WRITERS[out.suffix](str(temporary), table.schema))
            writer.write_table(table)

        yield append


def csv_table(schema: Schema, table: Any) -> Any:
    """Return a table of candidates as CSV can hold it, so that its features are read back equal: lists become text.

    Raises:
        InputError: If a text would be read as missing, as several values or on several lines.
    """
    features = {column.name: column for column in schema.features}
    missing = missing_texts(schema)
    columns = {}
    for name, values in zip(table.column_names, table.columns, strict=True):
        if name in features and features[name].is_list:
            values = _joined_lists(features[name], values, missing)
        elif pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            if name in features:
                _refuse_first(name, values, pc.is_in(values, pa.array(missing, pa.string())))
                if "" not in missing:
                    _refuse_first(name, values, values.is_null())
            _refuse_first(name, values, _has_line_break(values))
        columns[name] = values
    return pa.table(columns)


def _joined_lists(column: Column, lists: Any, missing: tuple[str, ...]) -> Any:
    texts = lists.cast(pa.list_(pa.string()))
    items = pc.list_flatten(texts)
    _refuse_first(column.name, items, pc.match_substring(items, column.separator))
    _refuse_first(column.name, items, pc.not_equal(pc.utf8_trim_whitespace(items), items))
    _refuse_first(column.name, items, pc.is_in(items, pa.array(missing, pa.string())))
    _refuse_first(column.name, items, _has_line_break(items))
    return pc.binary_join(texts, column.separator)


def _has_line_break(texts: Any) -> Any:
    return pc.match_substring_regex(texts, "[\r\n]")


def _refuse_first(name: str, texts: Any, wrong: Any) -> None:
    found = texts.filter(wrong)
    if len(found):
        got = f"{shown(found[0].as_py())}, which CSV cannot hold"
        raise InputError(f"column {name!r}: got {got}, wanted an OUT that ends in .parquet")
