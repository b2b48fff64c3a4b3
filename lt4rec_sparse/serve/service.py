"""A worker's model, threads, limits and counters together; what a route does, apart from HTTP."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from lt4rec_sparse.serve import body, oip, plain
from lt4rec_sparse.serve.metrics import Metrics
from lt4rec_sparse.serve.model import Model, Slot
from lt4rec_sparse.serve.requests import rank
from lt4rec_sparse.serve.settings import RequestError, Settings

LOG = logging.getLogger("lt4rec_sparse.serve")


@dataclass
class Trace:
    """What the log says of one request."""

    request_id: str
    model: Model | None = None
    rows: int = 0
    us: dict[str, float] = field(default_factory=dict)


class Service:
    """What the routes of one worker share.

    Args:
        settings: What the server was started with.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.slot = Slot(settings)
        self.metrics = Metrics()
        # A request has one thread of the engine: as many requests as cores then share them without waiting in each.
        self.pool = ThreadPoolExecutor(settings.threads, "rank", initializer=torch.set_num_threads, initargs=(1,))
        self.is_draining = False
        self._held = 0

    def load(self) -> Model:
        """Load the artefact, or the new one in its place, and say so in log and metrics.

        Raises:
            RequestError: If it cannot be served; an older one stays in use.
        """
        before = self.slot.current
        try:
            model = self.slot.load()
        except RequestError as error:
            self.metrics.loaded("refused")
            log("refused", artefact=self.settings.artefact, reason=str(error))
            raise
        if model is not before:
            self.metrics.loaded("loaded")
            log("loaded", artefact=self.settings.artefact, model=model.name, version=model.version)
            if model.examples_reason:
                log("examples", artefact=self.settings.artefact, reason=model.examples_reason)
        return model

    def refresh(self) -> None:
        """Load a file that has taken the place of the artefact, if there is one and it can be served."""
        if self.slot.is_changed():
            with suppress(RequestError):  # counted and logged
                self.load()

    def is_ready(self) -> bool:
        """Tell whether requests should be sent here."""
        return self.slot.is_served() and not self.is_draining

    def model(self, name: str | None = None, version: str | None = None) -> Model:
        """Return the model, if it has that name and version.

        Raises:
            RequestError: If it has not, or is unloaded; with status 404.
        """
        model = self.slot.current
        if model is None or not self.slot.is_served():
            raise RequestError("model: got a request while none is loaded, wanted one after it is", 404)
        if name is not None and name != model.name:
            raise RequestError(f"model: got {name!r}, wanted {model.name!r}", 404)
        if version is not None and version != model.version:
            raise RequestError(f"version: got {version!r}, wanted {model.version!r}", 404)
        return model

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Hold one request, or refuse it where too many are held already.

        Raises:
            RequestError: With status 503.
        """
        most = self.settings.threads + self.settings.waiting
        if self._held >= most:
            raise RequestError(f"server: got more than {most} requests at once, wanted fewer", 503)
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    def infer(
        self, model: Model, data: bytes, header_length: str | None, trace: Trace, submitted: int
    ) -> tuple[bytes, int | None]:
        """Answer a request of the Open Inference Protocol, in a thread: body, and how much of it is JSON."""
        clock = _Clock(trace, submitted)
        asked = oip.read(data, header_length, model.columns, model.tasks, model.name)
        trace.rows = asked.request.rows
        clock.lap("read")
        ranking = rank(model.ranker(), asked.request)
        clock.lap("compute")
        answer = oip.write(asked, ranking, model.name, model.version)
        clock.lap("write")
        self.metrics.succeeded(model.name, model.version, trace.rows, trace.us)
        return answer

    def rank(self, model: Model, data: bytes, trace: Trace, submitted: int) -> bytes:
        """Answer a request in plain JSON, in a thread."""
        clock = _Clock(trace, submitted)
        asked = plain.read(body.parse(data, model.columns.limits.depth), model.columns)
        trace.rows = asked.request.rows
        clock.lap("read")
        ranker = model.ranker(asked.precision)  # the first request in a precision pays for it
        ranking = rank(ranker, asked.request)
        clock.lap("compute")
        about = {"model": model.name, "version": model.version, "precision": ranker.precision, "us": dict(trace.us)}
        answer = plain.write(ranking, about)
        clock.lap("write")
        self.metrics.succeeded(model.name, model.version, trace.rows, trace.us)
        return answer

    def statistics(self, model: Model) -> dict[str, Any]:
        """Return what Triton's statistics say of a model, since the start."""
        totals = self.metrics.totals(model.name, model.version)

        def spent(count: str, us: str) -> dict[str, int]:
            return {"count": int(totals[count]), "ns": int(totals[us] * 1000)}

        success = "nv_inference_request_success"
        inference = {
            "success": spent(success, "nv_inference_request_duration_us"),
            "fail": {"count": int(totals["nv_inference_request_failure"]), "ns": 0},
            "queue": spent(success, "nv_inference_queue_duration_us"),
            "compute_infer": spent(success, "nv_inference_compute_infer_duration_us"),
        }
        return {
            "name": model.name,
            "version": model.version,
            "inference_count": int(totals["nv_inference_count"]),
            "execution_count": int(totals["nv_inference_exec_count"]),
            "inference_stats": inference,
        }


class _Clock:
    """Adds the time of each stage to a trace; what a request waited for its thread is `queue`."""

    def __init__(self, trace: Trace, submitted: int) -> None:
        self._trace, self._last = trace, time.perf_counter_ns()
        trace.us["queue"] = (self._last - submitted) / 1000

    def lap(self, stage: str) -> None:
        now = time.perf_counter_ns()
        self._trace.us[stage] = self._trace.us.get(stage, 0.0) + (now - self._last) / 1000
        self._last = now


def log(event: str, **facts: Any) -> None:
    """Write one line of JSON."""
    LOG.info(json.dumps({"time": round(time.time(), 6), "event": event, **facts}))
