"""Tables of other libraries as a data set: a folder with a Parquet file per table and their schema.

Everything behind it works as with files that somebody wrote there: preparing, states of files, resumption, scoring.
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lt4rec_sparse.errors import InputError, shown
from lt4rec_sparse.files import scratch_beside, whole_file
from lt4rec_sparse.ranker.features import Join, Schema
from lt4rec_sparse.ranker.features.schema import ValueType
from lt4rec_sparse.recsys.data.casts import plain_column
from lt4rec_sparse.recsys.data.draft import draft_schema
from lt4rec_sparse.recsys.data.remote import copy_file, is_copy, located
from lt4rec_sparse.recsys.data.seen import TABLES, table_suffix
from lt4rec_sparse.recsys.data.source import SCHEMA_FILE, DataError

ROW_GROUP_ROWS = 65_536
LOG, SIDE = "log", "side_{}"  # names of the files, without what says their kind
WANTED = "a table with __arrow_c_stream__ (pandas, polars, duckdb, pyarrow), a Dataset of pyarrow, or a path or URL"


def write_tables(
    table: Any, schema: Schema | Mapping[str, Any] | None, joins: Mapping[str, Any], folder: Path, is_begun: bool
) -> None:
    """Write a log and side tables into a folder, with a schema that names their files.

    A table is anything with the Arrow PyCapsule interface (`__arrow_c_stream__` or `__arrow_c_array__`) or a `Dataset`
    of pyarrow, whose batches become row groups of 65,536 rows one after another, so that memory holds a few of them; or
    the path of a file, to which the folder gets a link, or a URL, of which it gets a copy.

    Args:
        table: The log.
        schema: Its schema, in which the names of files do not count; as in `Schema.from_dict`, `name` and `files` may
            be absent. None for a draft of the columns.
        joins: Key column -> side table, or a list of those with this key, in the order of the schema's `joins`. Keys
            that the schema does not name are added to it.
        folder: The folder; it is made where it is absent.
        is_begun: Whether something was made of the tables that are in the folder already: others are refused then.

    Raises:
        InputError: If a table is of another kind, or the schema needs another side table.
        DataError: If a table cannot be read, has no rows or columns of another kind, or differs from the one in the
            folder.
        SchemaError: As in `Schema.from_dict`.
    """
    if not isinstance(joins, Mapping):
        raise InputError(f"joins: got {shown(joins)}, wanted a mapping of key columns to tables")
    folder.mkdir(parents=True, exist_ok=True)
    log = _write(table, folder, LOG, "table", is_begun)
    sides: list[tuple[str, Path]] = []
    for key, tables in joins.items():
        for side in tables if isinstance(tables, list | tuple) else [tables]:
            sides.append((key, _write(side, folder, SIDE.format(len(sides)), f"joins[{key!r}]", is_begun)))
    written = {log, *(path for _, path in sides)}
    for path in [*folder.glob(f"{LOG}.*"), *folder.glob(SIDE.format("*"))]:
        if path not in written and not is_begun:
            path.unlink()  # of an earlier call, of which nothing was made
    if schema is None:
        text = draft_schema(folder, log.name, {path.name: key for key, path in sides})
    else:
        if not isinstance(schema, Schema):
            schema = Schema.from_dict({"name": LOG, "files": {"log": [log.name]}, **schema})
        text = _filed(schema, log, sides).to_toml()
    path = folder / SCHEMA_FILE
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        found = Schema.from_toml(temporary)
        _check_joined(found, sides)
        if is_begun and not (path.exists() and Schema.from_toml(path) == found):
            raise DataError(f"schema: got another than {path}, wanted the same, or another folder")


def _filed(schema: Schema, log: Path, sides: list[tuple[str, Path]]) -> Schema:
    """Return a schema that names the files of tables."""
    left, joins = list(sides), []
    for join in schema.joins:
        found = next((side for side in left if side[0] == join.on), None)
        if found is None:
            raise InputError(f"joins: got no table for the key {join.on!r} of the schema, wanted one")
        left.remove(found)
        joins.append(replace(join, files=(found[1].name,)))
    joins += [Join((path.name,), key, _type_of(schema, key, path)) for key, path in left]
    return replace(schema, files=replace(schema.files, log=(log.name,)), joins=tuple(joins))


def _type_of(schema: Schema, key: str, path: Path) -> ValueType:
    """Return the type of a key that the schema does not join by: that of its column, or as the table has it."""
    known = schema.keys | {column.name: column.type for column in schema.columns}
    if key in known:
        return known[key]
    fields = pq.read_schema(path) if path.suffix == ".parquet" else pa.schema([])
    return "int" if key in fields.names and pa.types.is_integer(fields.field(key).type) else "string"


def _check_joined(schema: Schema, sides: list[tuple[str, Path]]) -> None:
    joined = {name for join in schema.joins for name in join.files}
    for key, path in sides:
        if path.name not in joined:
            wanted = "a column of the log whose values are once each in the side table"
            raise DataError(f"joins: got the key {key!r}, wanted {wanted}")


def _write(table: Any, folder: Path, stem: str, where: str, is_begun: bool) -> Path:
    """Write or link a table; return the path of its file."""
    if isinstance(table, str | Path):
        place = located(table)
        if isinstance(place, Path):
            return _link(place, folder, stem, where, is_begun)
        return _copied(place, folder, stem, where, is_begun)
    path = folder / f"{stem}.parquet"
    with scratch_beside(path) as scratch:
        new = scratch / path.name
        _write_batches(_batches(table, where), new, where)
        if is_begun:
            _check_same(new, path, where)
        elif path.is_symlink() or not _is_same(new, path):  # else it stays, and its time with it
            with whole_file(path) as temporary:
                new.replace(temporary)
    return path


def _is_same(new: Path, path: Path) -> bool:
    return path.exists() and filecmp.cmp(new, path, shallow=False)


def _check_same(new: Path, path: Path, where: str) -> None:
    if path.is_symlink() and not path.exists():
        got = f"{where}: got {path}, a link to {path.readlink()}, which is gone"
        raise DataError(f"{got}, wanted it to lead to the same file, or another folder")
    if not _is_same(new, path):
        got = f"{where}: got another table than the one in {path.parent}"
        raise DataError(f"{got}, wanted the same, or another folder")


def _link(table: Path, folder: Path, stem: str, where: str, is_begun: bool) -> Path:
    if not table.is_file() or table_suffix(table) is None:
        raise DataError(f"{where}: got {str(table)!r}, wanted a file, {', '.join(sorted(TABLES))}")
    target, link = table.resolve(), folder / f"{stem}{table_suffix(table)}"
    if link.exists() and link.resolve() == target:  # also the file itself, which a link would replace
        return link
    if is_begun:
        _check_same(target, link, where)
        return link
    with suppress(FileNotFoundError):
        link.unlink()
    link.symlink_to(target)
    return link


def _copied(url: str, folder: Path, stem: str, where: str, is_begun: bool) -> Path:
    suffix = table_suffix(PurePosixPath(url))
    if suffix is None:
        raise DataError(f"{where}: got {url!r}, wanted a file, {', '.join(sorted(TABLES))}")
    path = folder / f"{stem}{suffix}"
    if not is_begun:
        copy_file(url, path)
    elif not is_copy(url, path):
        with scratch_beside(path) as scratch:
            copy_file(url, scratch / "copy" / path.name)
            _check_same(scratch / "copy" / path.name, path, where)
    return path


def _write_batches(batches: Iterator[Any], path: Path, where: str) -> None:
    """Write record batches as row groups of equal size: files of the same rows are equal, however they were cut."""
    writer: Any = None
    try:
        for parts in _groups(batches):
            of_parts = [_plain(part, where) for part in parts]
            group = pa.Table.from_batches(of_parts).combine_chunks()
            if writer is None:
                writer = pq.ParquetWriter(path, group.schema, compression="zstd")
            writer.write_table(group)
    except pa.ArrowNotImplementedError as error:
        raise _unreadable(where, error) from error
    finally:
        if writer is not None:
            writer.close()
    if writer is None:
        raise DataError(f"{where}: got no row, wanted a table")


def _plain(batch: Any, where: str) -> Any:
    names = batch.schema.names
    columns = [plain_column(where, name, column) for name, column in zip(names, batch.columns, strict=True)]
    return pa.RecordBatch.from_arrays(columns, names=names)


def _groups(batches: Iterator[Any]) -> Iterator[list[Any]]:
    """Cut a stream into lists of batches that have `ROW_GROUP_ROWS` together; the last ones have the rest."""
    held: list[Any] = []
    lacking = ROW_GROUP_ROWS
    for batch in batches:
        begin = 0
        while batch.num_rows - begin >= lacking:
            yield [*held, batch.slice(begin, lacking)]
            begin += lacking
            held, lacking = [], ROW_GROUP_ROWS
        if begin < batch.num_rows:
            held.append(batch.slice(begin))
            lacking -= batch.num_rows - begin
    if held:
        yield held


def _batches(table: Any, where: str) -> Iterator[Any]:
    try:
        if hasattr(table, "__arrow_c_stream__"):
            reader = pa.RecordBatchReader.from_stream(table)
        elif hasattr(table, "__arrow_c_array__"):
            reader = pa.table(table).to_reader()
        elif hasattr(table, "scanner"):  # pyarrow.dataset.Dataset
            reader = table.scanner(batch_size=ROW_GROUP_ROWS).to_reader()
        else:
            raise InputError(f"{where}: got {shown(table)} of type {type(table).__name__}, wanted {WANTED}")
        yield from reader
    except (pa.ArrowException, OSError) as error:  # of the library that makes the batches, or of a Dataset's files
        raise _unreadable(where, error) from error


def _unreadable(where: str, error: Exception) -> DataError:
    return DataError(f"{where}: got {' '.join(str(error).split())[:300]}, wanted {WANTED}")
