"""Counters named as Triton names them, and latencies per stage, for Prometheus; of all workers where there are several.

`prometheus_client` adds `_total` to a counter's name; Triton's have none, so it is taken off when they are written.
With PROMETHEUS_MULTIPROC_DIR in the environment before this is imported, workers share their counters in that folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

STAGES = ("read", "queue", "compute", "write")
LABELS = ("model", "version")
BUCKETS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 5.0)
COUNTERS = {
    "nv_inference_request_success": "Requests that were answered.",
    "nv_inference_request_failure": "Requests to a model that were answered with an error.",
    "nv_inference_count": "Candidates that were scored.",
    "nv_inference_exec_count": "Calls of the model.",
    "nv_inference_request_duration_us": "Time of answered requests from their first byte to their response.",
    "nv_inference_queue_duration_us": "Time that answered requests waited for a thread.",
    "nv_inference_compute_infer_duration_us": "Time of encoding and computing.",
}
SUFFIX = re.compile(rb"(?m)^((?:# (?:HELP|TYPE) )?nv_\w+?)_total\b")


class Metrics:
    """What one worker counts."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._counters = {name: Counter(name, text, LABELS, registry=self._registry) for name, text in COUNTERS.items()}
        self._stages = Histogram(
            "lt4rec_sparse_stage_seconds",
            "Time of answered requests: read (receive and parse), queue, compute (encode and compute), write.",
            ("stage",),
            buckets=BUCKETS,
            registry=self._registry,
        )
        self._loads = Counter(
            "lt4rec_sparse_loads", "Artefacts that were loaded or refused.", ("result",), registry=self._registry
        )

    def succeeded(self, model: str, version: str, rows: int, stages_us: Mapping[str, float]) -> None:
        """Count a request that is answered."""
        counted = {
            "nv_inference_request_success": 1,
            "nv_inference_count": rows,
            "nv_inference_exec_count": 1,
            "nv_inference_request_duration_us": sum(stages_us.values()),
            "nv_inference_queue_duration_us": stages_us["queue"],
            "nv_inference_compute_infer_duration_us": stages_us["compute"],
        }
        for name, amount in counted.items():
            self._counters[name].labels(model, version).inc(amount)
        for stage in STAGES:
            self._stages.labels(stage).observe(stages_us[stage] / 1e6)

    def failed(self, model: str, version: str) -> None:
        """Count a request to a model that is answered with an error."""
        self._counters["nv_inference_request_failure"].labels(model, version).inc()

    def loaded(self, result: str) -> None:
        """Count an artefact: "loaded" or "refused"."""
        self._loads.labels(result).inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return SUFFIX.sub(rb"\1", generate_latest(self._read()))

    def totals(self, model: str, version: str) -> dict[str, float]:
        """Return each counter of a version by name, over all workers."""
        of_version = {"model": model, "version": version}
        totals = dict.fromkeys(COUNTERS, 0.0)
        for family in self._read().collect():
            for sample in family.samples:
                name = sample.name.removesuffix("_total")
                if name in totals and sample.labels == of_version:
                    totals[name] += sample.value
        return totals

    def _read(self) -> CollectorRegistry:
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return self._registry
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return registry
