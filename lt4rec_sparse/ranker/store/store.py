"""Features in memory, looked up by the ids of a request, and replaced all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.ranker.features import raw as raw_columns
from lt4rec_sparse.ranker.store.file import Features, read_features
from lt4rec_sparse.ranker.store.table import Keys, read_keys


class FeatureStore:
    """What is known of users and items, by key: a request brings ids, and the rest is looked up.

    Example:
        `ranker.rank(*store.complete({"video_id": ids, "tab": tabs}, {"user_id": [7], "hour": [20]}))`

    Any number of threads may read it while one reloads.

    Args:
        path: Where the features are from.
        features: What `read_features` gave.
    """

    def __init__(self, path: Path, features: Features) -> None:
        self._path = path
        self._features = features  # the one reference that a reload replaces

    @classmethod
    def open(cls, path: Path | str, schema: Schema | None = None) -> FeatureStore:
        """Read a file that `lt4rec-sparse features` or `write_features` wrote; `schema` is that of the ranker to serve.

        Raises:
            FileNotFoundError: If there is no such file.
            InputError: If the file is damaged, or was made for a model with another schema.
        """
        features = read_features(path)
        _check_schema(path, features, features.schema if schema is None else schema)
        return cls(Path(path), features)

    @property
    def day(self) -> str | None:
        """The day that histories and ages are as of."""
        return self._features.day

    @property
    def columns(self) -> dict[str, str]:
        """Feature that is here -> the column of a request that holds its key."""
        return self._features.columns

    @property
    def absent(self) -> tuple[str, ...]:
        """Features that are not here: a request brings them."""
        features = self._features
        return tuple(column.name for column in features.schema.features if column.name not in features.columns)

    def complete(self, candidates: Any, context: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Add the features of a request's keys: what `Ranker.rank` takes.

        Features go where their key is: those of a user in `context` have one row, those of items in `candidates` one
        per candidate. A column that the request has stays as it is. Unknown and missing keys have missing values, and
        counts of histories of 0.

        Args:
            candidates: Column name -> one value per candidate, or a table, as in `Ranker.rank`.
            context: Column name -> a sequence of one value, or a table of one row: what candidates have in common.

        Returns:
            `(candidates, context)`, new mappings.

        Raises:
            InputError: If a part is no table, a key is absent whose features are needed, or keys have another type than
                the schema's.
        """
        features = self._features  # once: a reload meanwhile changes nothing of this request
        given = raw_columns.columns_of(candidates), {} if context is None else raw_columns.columns_of(context)
        completed = dict(given[0]), dict(given[1])
        keys: dict[str, Keys] = {}  # several tables may have the same
        for table in features.tables:
            needed = [name for name in table.columns if name not in given[0] and name not in given[1]]
            if not needed:
                continue
            key = table.key.name
            part = next((part for part in (0, 1) if key in given[part]), None)
            if part is None:
                raise InputError(f"column {key!r}: got nothing, wanted keys: {needed[0]!r} is found by it")
            if key not in keys:
                keys[key] = read_keys(table.key, given[part][key])
            completed[part].update(table.take(keys[key], needed))
        return completed

    def reload(self, path: Path | str | None = None) -> None:
        """Read the file again, or another one, and replace all features at once.

        A reader has the old features or the new ones, never some of both. If this raises, the old ones stay.

        Raises:
            FileNotFoundError: If there is no such file.
            InputError: If the file is damaged, was made for another schema, or lacks a feature that is here.
        """
        path = self._path if path is None else Path(path)
        features, old = read_features(path), self._features
        _check_schema(path, features, old.schema)
        for name, key in old.columns.items():
            if features.columns.get(name) != key:
                raise InputError(f"{path}: column {name!r}: got nothing by {key!r}, wanted what is replaced")
        self._path, self._features = path, features


def _check_schema(path: Path | str, features: Features, schema: Schema) -> None:
    if features.schema != schema:
        got = f"features of a model with another schema ({features.schema.name!r})"
        raise InputError(f"{path}: got {got}, wanted them for this one ({schema.name!r}): write them with its artefact")
