"""From a click log, real or simulated, to batches: readers, splits by day, histories, fitting the encoder."""

from lt4rec_sparse.recsys.data.batches import SPLITS, Batch, BatchStream
from lt4rec_sparse.recsys.data.candidates import read_candidates
from lt4rec_sparse.recsys.data.prepare import Prepared, prepare, state_of
from lt4rec_sparse.recsys.data.requests import Candidates, complete_requests
from lt4rec_sparse.recsys.data.simulator import SimulatorConfig, simulate
from lt4rec_sparse.recsys.data.snapshot import Snapshot, take_snapshot
from lt4rec_sparse.recsys.data.source import DataError, kuairand_schema, open_source

__all__ = [
    "SPLITS",
    "Batch",
    "BatchStream",
    "Candidates",
    "DataError",
    "Prepared",
    "SimulatorConfig",
    "Snapshot",
    "complete_requests",
    "kuairand_schema",
    "open_source",
    "prepare",
    "read_candidates",
    "simulate",
    "state_of",
    "take_snapshot",
]
