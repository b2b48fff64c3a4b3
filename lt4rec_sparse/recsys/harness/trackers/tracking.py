"""What a tracker is told, by whichever process trains: no step twice, and nothing ends by a tracker's error."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol
from uuid import uuid4

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.files import read_json, write_whole

LOG = logging.getLogger("lt4rec_sparse.tracker")
FOLDER, FAILED, IDENTITY = "tracking", "failed", "identity.json"
NONE = "none"

Judged = Mapping[str, Mapping[str, Mapping[str, float]]]  # slice -> task -> metric -> value


class Tracker(Protocol):
    """A training, or a whole run, as one entry of a tracker; made by the process that trains.

    An entry that an earlier process began is continued. Any method may raise anything: `Course` catches it.
    """

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin, or go on, with the settings of the training, of which some are nested; called once, first."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in metrics, such as `train_loss/ctr`, after so many steps, more than at the call before."""

    def finish(self, results: Mapping[str, float], files: Sequence[Path]) -> None:
        """Take in the results, and files to keep a copy of where the tracker can; called last."""


# Name, which is that of a package and of an extra -> module and class, called with the folder, its identity, the name
# of an entry and the last step that the entry was told of, 0 before the first.
TRACKERS = {
    "tensorboard": f"{__package__}.tensorboard:TensorBoard",
    "mlflow": f"{__package__}.mlflow:MLflow",
}


def check_tracker(name: str) -> None:
    """Check the name of a tracker, and that its package is installed.

    Raises:
        InputError: If there is no such tracker, or its package is missing.
    """
    if name != NONE and name not in TRACKERS:
        raise InputError(f"tracker: got {name!r}, wanted one of {', '.join((NONE, *TRACKERS))}")
    if name != NONE and find_spec(name) is None:
        raise InputError(f"tracker: got {name!r}, which is not installed, wanted `pip install 'lt4rec-sparse[{name}]'`")


@lru_cache
def tracking(folder: Path, name: str) -> Tracking:
    """Return this process's `Tracking` of a folder."""
    return Tracking(folder, name)


class Tracking:
    """Tells a tracker of the trainings in a folder.

    `tracking/` in the folder holds what must outlive a process: the folder's identity, by which entries are found
    again, and per tracker, in a folder of its name, the last step that it was told of each entry, and its first error,
    which ends the tracking until the next `begin`.
    """

    def __init__(self, folder: Path, name: str = NONE) -> None:
        self.folder, self.name = folder, name
        self._courses: dict[str, Course] = {}
        self._is_begun = False

    @property
    def is_on(self) -> bool:
        """Whether there is a tracker that has not failed."""
        return self.name != NONE and not self._own(FAILED).exists()

    def begin(self) -> None:
        """Prepare the tracker, before processes that train do so at the same time; try one again that failed."""
        if self.name == NONE:
            return
        self._is_begun = True
        self._courses.clear()  # what they were not told is not in their journals
        self._own(FAILED).unlink(missing_ok=True)
        if not self._path(IDENTITY).exists():
            write_whole(self._path(IDENTITY), json.dumps({"identity": uuid4().hex}))
        self.guarded(lambda: self.tracker("run", 0))

    def course(self, entry: str, config: Mapping[str, Any] | None = None) -> Course:
        """Return the course of a training that this process carries out; it starts with `config` where it is new."""
        if entry not in self._courses:
            self._courses[entry] = Course(self, entry, self._own(f"{entry}.json"), config or {})
        return self._courses[entry]

    def finish(self, entry: str, results: Mapping[str, float], files: Sequence[Path] = ()) -> None:
        """Finish a course, with its results."""
        if self.is_on:
            self.course(entry).finish(results, files)
            del self._courses[entry]

    def whole(
        self,
        config: Mapping[str, Any],
        seeds: int,
        records: Iterable[Mapping[str, Any]],
        files: Sequence[Path],
        entry: str = "run",
    ) -> None:
        """Tell of a whole run: its settings, the `figures` of its records after so many seeds, and its files.

        A command that trained nothing has not begun before.
        """
        if not self._is_begun:
            self.begin()
        self._is_begun = False  # the next command begins again
        if self.is_on:
            course = self.course(entry, config)
            course.log(seeds, figures(records))
            if not course.is_finished:  # also where an earlier command logged the figures and then failed
                self.finish(entry, {}, files)

    def guarded(self, call: Callable[[], Any]) -> bool:
        """Return whether a call raises nothing; what it raises is told once per folder and tracker."""
        try:
            call()
        except Exception as error:  # whatever a tracker raises, trainings go on without it
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            try:
                with self._own(FAILED).open("x", encoding="utf-8") as file:
                    file.write(reason)
            except FileExistsError:
                return False
            LOG.warning("warning: tracker %s: got %s; the run goes on without it", self.name, reason[:300])
            return False
        return True

    def tracker(self, entry: str, step: int) -> Tracker:
        """Return the tracker's object for an entry, which was told of the steps up to `step`."""
        module, _, name = TRACKERS[self.name].partition(":")
        identity = read_json(self._path(IDENTITY), "identity")["identity"]
        tracker: Tracker = getattr(importlib.import_module(module), name)(self.folder, identity, entry, step)
        return tracker

    def _own(self, name: str) -> Path:
        """Return a path of this tracker's: what one was told, another one was not."""
        return self._path(f"{self.name}/{name}")

    def _path(self, name: str) -> Path:
        path = self.folder / FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class Course:
    """The course of one training; its last step is on disk before the tracker is told, so that none is told twice.

    A step at which the tracker raised is taken back: the next command may tell it.
    """

    def __init__(self, tracking: Tracking, entry: str, journal: Path, config: Mapping[str, Any]) -> None:
        self._tracking, self._entry, self._journal, self._config = tracking, entry, journal, config
        known = read_json(journal) if journal.exists() else {}
        self._step: int = known.get("step", 0)
        self._told: list[str] | None = known.get("told")  # names of results; None while it goes on
        self._tracker: Tracker | None = None  # started when there is something to tell

    @property
    def is_finished(self) -> bool:
        """Whether the tracker was told that there is no more."""
        return self._told is not None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tell the tracker metrics after so many steps, unless it was told of that step."""
        if step > self._step:
            self._tell(lambda tracker: tracker.log(step, metrics), step, None)

    def finish(self, results: Mapping[str, float], files: Sequence[Path]) -> None:
        """Tell the tracker the results that it was not told, if any, or that there is none."""
        new = {name: value for name, value in results.items() if name not in (self._told or ())}
        if new or self._told is None:
            told = [*(self._told or ()), *new]
            self._tell(lambda tracker: tracker.finish(new, files), self._step, told)

    def _tell(self, call: Callable[[Tracker], None], step: int, told: list[str] | None) -> None:
        before = self._step, self._told
        self._step, self._told = step, told
        if self._tracking.is_on:
            self._note()
            if not self._tracking.guarded(lambda: call(self._started(before[0]))):
                self._step, self._told = before
                self._note()

    def _note(self) -> None:
        write_whole(self._journal, json.dumps({"step": self._step, "told": self._told}))

    def _started(self, step: int) -> Tracker:
        if self._tracker is None:
            tracker = self._tracking.tracker(self._entry, step)
            tracker.start(self._config)
            self._tracker = tracker
        return self._tracker


def flat(split: str, judged: Judged) -> dict[str, float]:
    """Return metrics as `split/task/metric`, those of a slice as `split/slice/task/metric`."""
    return {
        "/".join((split, *([] if part == "all" else [part]), task, metric)): value
        for part, tasks in judged.items()
        for task, metrics in tasks.items()
        for metric, value in metrics.items()
    }


def figures(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return what records say of all test rows, `row/task/metric` -> the mean over the seeds."""
    found: dict[str, list[float]] = {}
    for record in records:
        for task, metrics in record["test"]["all"].items():
            for metric, value in metrics.items():
                found.setdefault(f"{record['row']}/{task}/{metric}", []).append(value)
    return {name: fmean(values) for name, values in found.items()}
