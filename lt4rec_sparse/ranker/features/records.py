"""From parsed TOML or JSON to frozen dataclasses and back: the annotations are the format; all else is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lt4rec_sparse.errors import InputError, shown


class SchemaError(InputError):
    """A schema contradicts itself; the message is one line: where, what was found, what was wanted."""


def to_plain(value: Any) -> Any:
    """Return the result of `asdict` with lists for tuples and without entries that are None, which TOML lacks."""
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items() if item is not None}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def later(default: Any, before: Any = MISSING) -> Any:
    """Return a field that records stored earlier lack, and what those that lack it mean: by default its default."""
    return dataclasses.field(default=default, metadata={"before": default if before is MISSING else before})


def to_stored(value: Any) -> Any:
    """Return a record as data for JSON, without what records stored before a field was there mean by its absence."""
    if not is_dataclass(value):
        return [to_stored(item) for item in value] if isinstance(value, tuple) else value
    held = ((known, getattr(value, known.name)) for known in fields(value))
    return {
        known.name: to_stored(item)
        for known, item in held
        if item is not None and not ("before" in known.metadata and known.metadata["before"] == item)
    }


def to_toml(record: Any) -> str:
    """Return a dataclass as TOML, without fields that are at their default; `from_plain` reads it back equal.

    Its fields are text, numbers, tuples of those, dataclasses, or tuples of dataclasses, which must be flat themselves.
    """
    lines: list[str] = []
    tables: list[str] = []
    for field in fields(record):
        value = getattr(record, field.name)
        if value is None or value == field.default:
            continue
        if is_dataclass(value):
            tables += ["", f"[{field.name}]", to_toml(value)]
        elif isinstance(value, tuple) and any(map(is_dataclass, value)):
            tables += [line for item in value for line in ("", f"[[{field.name}]]", to_toml(item))]
        else:
            # TOML writes strings as JSON does, except for one control character.
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            lines.append(f"{field.name} = {text}")
    return "\n".join([*lines, *tables])


def from_plain(value: Any, hint: Any, where: str) -> Any:
    """Return parsed `value` as the annotated type `hint`: a dataclass, `tuple[X, ...]`, literal, union or scalar.

    An unknown or absent key, or a value that is not of its type, is a `SchemaError` that begins with `where`. A key
    whose type includes None may be absent.
    """
    if is_dataclass(hint):
        return _record(value, hint, where)
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise SchemaError(f"{where}: got {shown(value)}, wanted a list")
        return tuple(from_plain(item, get_args(hint)[0], f"{where}[{index}]") for index, item in enumerate(value))
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            wanted = ", ".join(map(repr, get_args(hint)))
            raise SchemaError(f"{where}: got {shown(value)}, wanted one of {wanted}")
        return value
    accepted = get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)
    arms = [arm for arm in accepted if arm is not NoneType]
    if len(arms) < len(accepted) and len(arms) == 1 and value is not None:  # an optional table, list or literal
        return from_plain(value, arms[0], where)
    if type(value) not in accepted:  # `type`, not isinstance: True is not 1 here
        wanted = " or ".join(kind.__name__ for kind in accepted if kind is not NoneType)
        raise SchemaError(f"{where}: got {shown(value)}, wanted {wanted}")
    return value


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)  # it compiles each annotation: most of the time that a schema takes to read


def _record(value: Any, cls: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise SchemaError(f"{where}: got {shown(value)}, wanted a table")
    if isinstance(value.get("name"), str):
        where = f"{where} {shown(value['name'])}"
    hints, known = _hints(cls), {field.name: field for field in fields(cls)}
    for key in value:
        if key not in known:
            raise SchemaError(f"{where}: key {shown(key)} is unknown, wanted one of {', '.join(known)}")
    undefined = [key for key, field in known.items() if field.default is MISSING]
    needed = [key for key in undefined if NoneType not in get_args(hints[key])]
    absent = next((key for key in needed if key not in value), None)
    if absent is not None:
        raise SchemaError(f"{where}: key {absent!r} is absent, wanted at least {', '.join(needed)}")
    given = {key: from_plain(item, hints[key], f"{where}: {key}") for key, item in value.items()}
    return cls(**dict.fromkeys(undefined) | given)
