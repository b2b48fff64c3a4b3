"""From a table in memory, a file or a folder to a ranker, in one call."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.files import write_whole
from lt4rec_sparse.ranker import Ranker, load
from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.recsys.data.draft import draft_schema
from lt4rec_sparse.recsys.data.remote import COPY, data_name, is_folder, local_data
from lt4rec_sparse.recsys.data.source import SCHEMA_FILE, schema_of
from lt4rec_sparse.recsys.data.table_folder import write_tables
from lt4rec_sparse.recsys.frozen import freeze_trial
from lt4rec_sparse.recsys.harness.by_rows import few_steps
from lt4rec_sparse.recsys.harness.jobs import forget_laboratories, laboratory
from lt4rec_sparse.recsys.harness.settings import RunSettings
from lt4rec_sparse.recsys.harness.study import Progress, Resources
from lt4rec_sparse.recsys.run import MODEL, Given, begun, served_row, trained
from lt4rec_sparse.recsys.training import fastest_dtype

TABLE = "table"  # the folder of tables in a run folder, and the name of their data

Metrics = dict[str, dict[str, dict[str, float | None]]]  # split -> task -> metric -> value


class Fitted(Ranker):
    """A ranker that `fit` has trained.

    Attributes:
        metrics: How it did: "validation" or "test" -> task -> metric -> value, of the model as trained, on all rows of
            the split. Binary tasks have `auc`, `log_loss`, `calibration` and, in a log with groups, `gauc` and those at
            the top; ratios have `mse` and `calibration`. A metric that the rows do not define is None.
        schema: The schema that it was trained with, drafted or given.
    """

    def __init__(self, ranker: Ranker, metrics: Metrics) -> None:
        super().__init__(ranker.encoder, ranker.inputs, ranker.mlp)
        self.metrics = metrics
        self.schema: Schema = ranker.encoder.schema


def fit(
    table: Any,
    schema: Schema | Mapping[str, Any] | str | Path | None = None,
    *,
    joins: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    progress: Progress = lambda stage, done, total: None,
    resources: Resources | None = None,
    **settings: Any,
) -> Fitted:
    """Train a ranker with a sparse mask per task on a log, as `lt4rec-sparse run` trains the one that it serves.

    Rows are split, batches and epochs chosen by their number, masks found, and the served model chosen on the
    validation rows, as there; what `run` trains for comparison is left out, and so is its report. `run --data OUT/table
    --out OUT` with the same settings adds both, and trains nothing again. The test rows are read once, after training.

    Example:
        `fit(clicks, joins={"video_id": videos}, out="runs/shop").rank({"video_id": [7, 9], ...})`, where `clicks` and
        `videos` are data frames.

    Args:
        table: The log: anything with the Arrow PyCapsule interface (`__arrow_c_stream__`: a data frame of pandas or
            polars, a relation of duckdb, a Table or RecordBatchReader of pyarrow), a `Dataset` of pyarrow, or the path
            or URL of a file: all that is read once, in batches. Or a folder or its URL, as `run --data` takes it.
        schema: A `Schema`, a mapping as in `Schema.from_dict`, or the path of a schema.toml. Of a table the names of
            files in it do not count, and a mapping may leave out `name` and `files`. None: a folder's own schema, or
            else a draft made from the columns, as by `lt4rec-sparse schema`: read it before you rely on the ranker.
        joins: Key column -> the side table with this column, in any form of a table, or a list of them.
        out: The run folder, which a later call with the same arguments continues; None for a temporary one. The tables
            are written to its `table/`, with their schema; the artefact is `model.safetensors`.
        progress: Called with a stage's name, steps done and steps in all.
        resources: The processes that train. By default trainings run in this one, one after another, with all of
            torch's threads: a script then needs no `if __name__ == "__main__":`.
        settings: Attributes of `RunSettings`; lists may stand for tuples. Without `dtype` the faster one on this
            machine is taken, as by `run`.

    Returns:
        The ranker of the artefact, in fp32, with its metrics.

    Raises:
        InputError: If a setting is unknown or out of its range, a table is of no kind that is read, or `out` holds a
            run with other settings, or is another process's.
        DataError: If `out` holds a run on other tables, or the data do not match their schema.
        SchemaError: If the schema contradicts itself.

    Source: LT4REC (arXiv 2008.09872), section 2.
    """
    chosen = _settings(settings)
    if out is None:
        with TemporaryDirectory(prefix="lt4rec-sparse-") as folder:
            return _fit(table, schema, joins or {}, Path(folder), chosen, progress, resources)
    return _fit(table, schema, joins or {}, Path(out), chosen, progress, resources)


def _fit(
    table: Any,
    schema: Schema | Mapping[str, Any] | str | Path | None,
    joins: Mapping[str, Any],
    out: Path,
    settings: RunSettings,
    progress: Progress,
    resources: Resources | None,
) -> Fitted:
    if isinstance(schema, str | Path):
        schema = Schema.from_toml(schema)
    if isinstance(table, str | Path) and is_folder(table):
        if joins:
            raise InputError(f"joins: got side tables beside the folder {table}, wanted them in its schema")
        given = Given(data_name(table), partial(_of_folder, table, schema, out, progress))
    else:
        given = Given(TABLE, partial(_of_tables, table, schema, joins, out / TABLE))
    try:
        with torch.random.fork_rng(devices=[]), begun(given, out, settings, progress) as log:
            here = resources or Resources(executor="here")
            study = trained(log, out, progress, here, lambda row: any(trial.masks for trial in row.trials))
            row = served_row(study.records, log.settings.masks, log.tasks)
            lab = laboratory(out)
            freeze_trial(lab, study.trials[row, 0][0], out / MODEL, log.settings.embeddings)
            record = next(record for record in study.records if (record["row"], record["seed"]) == (row, 0))
            training = log.settings.training
            if warning := few_steps(lab.batches(training) * training.epochs):
                warnings.warn(warning, RuntimeWarning, stacklevel=3)
            return Fitted(load(out / MODEL), {split: record[split]["all"] for split in ("validation", "test")})
    finally:
        forget_laboratories()  # whoever fits a model keeps no decoded rows


def _of_tables(
    table: Any, schema: Schema | Mapping[str, Any] | None, joins: Mapping[str, Any], folder: Path, is_begun: bool
) -> tuple[Path, None]:
    write_tables(table, schema, joins, folder, is_begun)
    return folder, None


def _of_folder(
    place: str | Path, schema: Schema | Mapping[str, Any] | None, out: Path, progress: Progress, is_begun: bool
) -> tuple[Path, Schema]:
    if isinstance(schema, Mapping):
        schema = Schema.from_dict(schema)
    folder = local_data(place, out / COPY, schema, progress)
    schema = schema or schema_of(folder)
    if schema is None:
        write_whole(out / SCHEMA_FILE, draft_schema(folder))
        schema = Schema.from_toml(out / SCHEMA_FILE)
    return folder, schema


def _settings(given: Mapping[str, Any]) -> RunSettings:
    known = {field.name for field in fields(RunSettings)}
    stray = next((name for name in given if name not in known), None)
    if stray is not None:
        raise InputError(f"settings: got {stray!r}, wanted one of {', '.join(sorted(known))}")
    tuples: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if "dtype" not in tuples:
        tuples["dtype"] = fastest_dtype()  # measured: not for nothing
    return RunSettings(**tuples)
