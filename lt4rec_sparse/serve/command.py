"""`lt4rec-sparse serve`; imported by the command line, so it imports the rest when it runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.serve.settings import Limits, Settings

DAY = 86_400
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of the kernel, in a container: microseconds of a period, or "max"


def serve(
    model: Annotated[Path, typer.Argument(help="The artefact that `run` wrote: model.safetensors.")],
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port.")] = 8000,
    precision: Annotated[str, typer.Option(help="How the MLP computes: fp32, bf16 or int8.")] = "fp32",
    name: Annotated[str, typer.Option(help="The model's name in paths. By default the schema's.")] = "",
    workers: Annotated[int, typer.Option(min=1, max=1024, help="Processes.")] = 1,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Requests that one process computes at once. By default cores / workers."),
    ] = None,
    waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait in one process; others get 503.")] = 64,
    watch: Annotated[float, typer.Option(help="Seconds between looks for a new artefact; 0: never.")] = 1.0,
    drain: Annotated[float, typer.Option(help="Seconds to serve on, not ready, after SIGTERM.")] = 5.0,
    stop: Annotated[int, typer.Option(min=1, help="Seconds that requests in flight have after that.")] = 30,
    control: Annotated[bool, typer.Option("--control", help="Let clients load and unload the model.")] = False,
    examples: Annotated[Path | None, typer.Option(help="A JSON file of requests for the page at /.")] = None,
    access_log: Annotated[bool, typer.Option(help="Write a line of JSON per request.")] = True,
    max_rows: Annotated[int, typer.Option(min=1, help="Candidates of one request, at most.")] = Limits.rows,
    max_bytes: Annotated[int, typer.Option(min=1, help="Bytes of one request, at most.")] = Limits.body_bytes,
    max_json_bytes: Annotated[int, typer.Option(min=1, help="Bytes of JSON of them.")] = Limits.json_bytes,
) -> None:
    """Serve an artefact over HTTP: the Open Inference Protocol, plain JSON at /rank, a page at /, /metrics."""
    # Nothing here loads torch: a process that only watches over workers stays small.
    from lt4rec_sparse.serve.worker import run

    for option, seconds in (("--watch", watch), ("--drain", drain)):
        if not 0 <= seconds <= DAY:  # neither is NaN
            raise InputError(f"{option}: got {seconds} seconds, wanted 0 to {DAY:,}")
    if not model.is_file():
        raise InputError(f"{model}: no such file, wanted an artefact (model.safetensors)")
    settings = Settings(
        artefact=str(model.absolute()),  # not resolved: a link that leads elsewhere is a new artefact
        precision=precision,
        name=name,
        threads=threads or max(1, cores() // workers),
        waiting=waiting,
        watch_seconds=watch,
        drain_seconds=drain,
        control=control,
        examples="" if examples is None else str(examples.absolute()),
        access_log=access_log,
        limits=Limits(rows=max_rows, body_bytes=max_bytes, json_bytes=max_json_bytes),
    )
    run(settings, host, port, workers, stop)


def cores(quota: Path = QUOTA) -> int:
    """Return how many cores this process may keep busy: those it may run on, or fewer by its container's quota."""
    admitted = len(os.sched_getaffinity(0))
    try:
        most, period = quota.read_text(encoding="ascii").split()
        return max(1, min(admitted, int(most) // int(period)))
    except (OSError, ValueError):  # no such file, or "max": no quota
        return admitted
