"""Trainings in MLflow: a run per training, in one experiment per folder."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Before MLflow reads them: its own patience with a server that does not answer is minutes per call.
for _name, _value in (("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"), ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")):
    os.environ.setdefault(_name, _value)

from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Metric, Param  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402

ENTRY = "lt4rec_sparse_entry"  # the tag by which an entry is found again
FOREIGN = re.compile(r"[^\w\-. /]", re.ASCII)  # what MLflow admits in no name
MOST = 6000  # characters of a parameter
TERMINAL = logging.WARNING  # MLflow and Alembic tell of every table that they make


class MLflow:
    """An entry as an MLflow run.

    `MLFLOW_TRACKING_URI` names the server or store; without it that is `mlflow.db` in the folder, with files in
    `mlruns/` beside it. `MLFLOW_EXPERIMENT_NAME` names the experiment, by default `lt4rec-sparse/<name of the folder>`.
    """

    def __init__(self, folder: Path, identity: str, entry: str, step: int) -> None:
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(TERMINAL)
        folder = folder.resolve()
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(tracking_uri=uri or f"sqlite:///{folder / 'mlflow.db'}")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or f"lt4rec-sparse/{folder.name}"
        self._experiment = self._made(name, None if uri else (folder / "mlruns").as_uri())
        self._name, self._tag, self._step = entry, f"{identity}/{entry}", step

    def start(self, config: Mapping[str, Any]) -> None:
        """Find the entry's run, or create it with its settings as parameters."""
        found = self._client.search_runs([self._experiment], f"tags.{ENTRY} = '{self._tag}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        run = self._client.create_run(self._experiment, tags={ENTRY: self._tag}, run_name=self._name)
        self._run = run.info.run_id
        params = [Param(FOREIGN.sub("_", name), str(value)[:MOST]) for name, value in _leaves(config)]
        self._client.log_batch(self._run, params=params)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics of a step in one call; letters that MLflow refuses in a name become `_`."""
        self._step, now = step, int(time.time() * 1000)
        found = [Metric(FOREIGN.sub("_", name), float(value), now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run, metrics=found)

    def finish(self, results: Mapping[str, float], files: Sequence[Path]) -> None:
        """Log the results at the last step and the files as artefacts, and end the run."""
        if results:
            self.log(self._step, results)
        for path in files:
            self._client.log_artifact(self._run, str(path))
        self._client.set_terminated(self._run)

    def _made(self, name: str, place: str | None) -> str:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                made: str = self._client.create_experiment(name, artifact_location=place)
            except MlflowException:  # another process was faster
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:
                    raise
            else:
                return made
        found: str = experiment.experiment_id
        return found


def _leaves(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings as `outer.inner`."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value
