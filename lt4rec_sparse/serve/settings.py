"""What a server is started with, and what a request may cost at most."""

from __future__ import annotations

from dataclasses import dataclass, field

from lt4rec_sparse.errors import InputError


class RequestError(InputError):
    """A request that is answered with an error; `status` is that of HTTP."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What one request may hold at most.

    Attributes:
        body_bytes: Bytes of its body; read no further.
        json_bytes: Bytes of JSON of them, which take up to some 30 times as much when they are parsed.
        rows: Candidates.
        depth: Levels of nested lists and objects in JSON.
        bag_values: Values of one candidate in a multi-valued column.
        text_bytes: Bytes of one text, in UTF-8.
        exponents: Factors of the rank score: each is computed for every candidate.
        body_seconds: How long its body may take to arrive.
    """

    body_bytes: int = 8 << 20
    json_bytes: int = 1 << 20
    rows: int = 10_000
    depth: int = 8
    bag_values: int = 1_000
    text_bytes: int = 4_096
    exponents: int = 64
    body_seconds: float = 10.0


@dataclass(frozen=True)
class Settings:
    """What a server is started with; plain data, so that every worker process reads the same.

    Attributes:
        artefact: The file to serve.
        precision: How the MLP computes: "fp32", "bf16" or "int8".
        name: The model's name in paths; empty for the schema's.
        threads: Requests that one worker computes at once, each on one thread.
        waiting: Requests beyond those that a worker holds; more are refused with 503, before they are read.
        watch_seconds: How often the file is looked at for a new artefact; 0 for never.
        drain_seconds: How long a stopped worker still serves while it says that it is not ready.
        control: Whether clients may load and unload the model.
        examples: A JSON file of requests for the page; empty to make some from the vocabularies.
        access_log: Whether every request is written to the log.
        loader: `module:function` that returns a `Ranker` from path and precision.
        shared_folder: Where the workers of one server keep what they share; empty for a single worker.
        limits: What one request may hold at most.
    """

    artefact: str
    precision: str = "fp32"
    name: str = ""
    threads: int = 1
    waiting: int = 64
    watch_seconds: float = 1.0
    drain_seconds: float = 5.0
    control: bool = False
    examples: str = ""
    access_log: bool = True
    loader: str = "lt4rec_sparse.ranker:load"
    shared_folder: str = ""
    limits: Limits = field(default_factory=Limits)
