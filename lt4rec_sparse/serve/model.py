"""The model behind the routes: loaded, checked and warmed up before it takes the place of another."""

from __future__ import annotations

import json
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.network import PRECISIONS
from lt4rec_sparse.ranker import Ranker
from lt4rec_sparse.ranker.artefact import KEY
from lt4rec_sparse.serve import examples, oip, plain
from lt4rec_sparse.serve.columns import Columns
from lt4rec_sparse.serve.requests import rank
from lt4rec_sparse.serve.settings import RequestError, Settings

WARM_UP = (1, 256)  # candidates: the two sizes for which the engine lays weights out differently
ATTEMPTS = 3  # to read a file that is replaced meanwhile


class Model:
    """One artefact, ready to serve.

    Args:
        ranker: In the server's precision.
        name: What paths call the model.
        version: The first 12 digits of the artefact's SHA-256.
        settings: The server's.

    Attributes:
        examples: Requests for the page.
        examples_reason: Why they are not those of the settings' file; empty if they are, or there is none.

    Raises:
        InputError: If a task has the name of another output, or the model one that paths cannot have; if a score of
            the warm-up is not finite.
    """

    def __init__(self, ranker: Ranker, name: str, version: str, settings: Settings) -> None:
        taken = next((task for task in ranker.tasks if task in (oip.RANK_SCORE, oip.ROW)), None)
        if taken is not None:
            raise InputError(f"task {taken!r}: got the name of an output of every model, wanted another name")
        if not name or "/" in name:
            raise InputError(f"name: got {name!r}, wanted one without '/', as paths have it: --name")
        self.name, self.version, self.tasks = name, version, ranker.tasks
        self.precision = ranker.precision
        self.columns = Columns(ranker.encoder.schema, settings.limits)
        self.encoder = ranker.encoder
        self.loaded_at = time.time()
        self._rankers = {ranker.precision: ranker}
        self._lock = threading.Lock()
        is_calibrated = ranker.mlp.network.quantization is not None
        self.precisions = tuple(p for p in PRECISIONS if is_calibrated or p != "int8")
        self.examples, self.examples_reason = _examples(ranker, self.columns, settings.examples)
        _warm_up(ranker, self.columns)

    def ranker(self, precision: str = "") -> Ranker:
        """Return the ranker in a precision, prepared when it is first asked for.

        Raises:
            RequestError: If the artefact does not have it.
        """
        precision = precision or self.precision
        if precision not in self.precisions:
            raise RequestError(f"precision: got {precision!r}, wanted one of {', '.join(self.precisions)}")
        found = self._rankers.get(precision)  # without the lock, which is held for as long as another is prepared
        if found is not None:
            return found
        with self._lock:
            if precision not in self._rankers:
                ranker = self._rankers[self.precision].to_precision(precision)
                _warm_up(ranker, self.columns)
                self._rankers[precision] = ranker
            return self._rankers[precision]


class Slot:
    """The place of the one model that a server has.

    A new artefact takes the place of the old one when it is ready; while requests still use the old one it stays in
    memory. One that cannot be served is refused, and the old one stays.

    Attributes:
        current: The model in use; None before the first `load`.
        reason: Why the newest file was refused; empty if it was not.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.current: Model | None = None
        self.reason = ""
        self._seen: tuple[int, ...] | None = None
        self._lock = threading.Lock()
        self._unloaded = False
        # Looked for per request, so only where a client can unload.
        is_shared = settings.control and settings.shared_folder
        self._flag = Path(settings.shared_folder) / "unloaded" if is_shared else None

    def is_served(self) -> bool:
        """Tell whether there is a model, and no client has unloaded it, by whichever worker."""
        is_unloaded = self._flag.exists() if self._flag else self._unloaded
        return self.current is not None and not is_unloaded

    def is_changed(self) -> bool:
        """Tell whether there is another file than the last that was loaded or refused."""
        return _identity(self.settings.artefact) not in (self._seen, None)

    def load(self) -> Model:
        """Load the file, unless it is the one in use; where a client has unloaded it, requests wait for `resume`.

        Raises:
            RequestError: If it cannot be served, for whatever reason: the old model stays in use.
        """
        with self._lock:
            found = _identity(self.settings.artefact)
            if self.current is None or self.reason or found != self._seen:
                self._seen = found
                try:
                    model = load(self.settings)
                    if self.current is not None and model.name != self.current.name:
                        raise InputError(f"name: got {model.name!r}, wanted {self.current.name!r}, which is served")
                    self.current = model
                except Exception as error:
                    self.reason = " ".join(str(error).split()) or type(error).__name__
                    raise RequestError(self.reason) from error
                self.reason = ""
            return self.current

    def resume(self) -> None:
        """Answer requests again after `unload`, by all workers."""
        self._unloaded = False
        if self._flag:
            self._flag.unlink(missing_ok=True)

    def unload(self) -> None:
        """Answer no more requests until `resume`, by all workers; the memory is kept."""
        self._unloaded = True
        if self._flag:
            self._flag.touch()


def load(settings: Settings) -> Model:
    """Load, check and warm up an artefact.

    Raises:
        InputError: If it cannot be served.
        OSError: If it cannot be read.
    """
    module, _, function = settings.loader.partition(":")
    read = getattr(import_module(module), function)
    for _ in range(ATTEMPTS):
        before = _identity(settings.artefact)
        ranker: Ranker = read(settings.artefact, settings.precision)
        version = version_of(settings.artefact)
        if _identity(settings.artefact) == before:
            return Model(ranker, settings.name or ranker.encoder.schema.name, version, settings)
    raise InputError(f"{settings.artefact}: got a file that is replaced again and again, wanted one that stays")


def _examples(ranker: Ranker, columns: Columns, path: str) -> tuple[list[dict[str, Any]], str]:
    """Return requests for the page, and why they are made ones although there is a file: of an older artefact, say."""
    reason = ""
    if path:
        try:
            return examples.from_file(path, columns), ""
        except (InputError, OSError) as error:
            reason = str(error)
    return examples.made(ranker.encoder, requests=5, rows=20), reason


def _warm_up(ranker: Ranker, columns: Columns) -> None:
    """Score candidates in the sizes that requests have, so that the first request does not pay for it."""
    for rows in WARM_UP:
        (request,) = examples.made(ranker.encoder, 1, min(rows, columns.limits.rows))
        ranking = rank(ranker, plain.read(request, columns).request)
        for task, scores in ranking.scores.items():
            if not (np.isfinite(scores).all() and (scores >= 0).all() and (scores <= 1).all()):
                raise InputError(f"task {task!r}: got scores outside of 0 to 1 in the warm-up, wanted probabilities")


def _identity(path: str) -> tuple[int, ...] | None:
    """Return what differs between two files of one name; None if there is none."""
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def version_of(path: str) -> str:
    """Return the version of an artefact: the first 12 digits of the SHA-256 that it holds."""
    with safe_open(path, "pt") as file:
        metadata: dict[str, Any] = json.loads(file.metadata()[KEY])
    return str(metadata["sha256"])[:12]
