"""A worker process: the application as uvicorn makes it, from settings that the environment holds."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.serve.settings import Limits, Settings

SETTINGS = "LT4REC_SPARSE_SERVE"  # in the environment: settings as JSON, which a spawned worker inherits
REFUSED = "refused"  # a file in the workers' folder: one of them could not start
STARTUP_FAILURE = 3  # uvicorn's exit code of a worker that cannot start: it is not started again


def run(settings: Settings, host: str, port: int, workers: int, stop_seconds: int, backlog: int = 2048) -> None:
    """Serve until a signal ends it.

    Workers are spawned, not forked: in a forked child the engine computes on one thread, and a lock that another thread
    held at the fork stays held.

    Args:
        settings: What all workers are started with.
        host: The address to listen at.
        port: The port; 0 for a free one.
        workers: Processes.
        stop_seconds: How long requests in flight may still take when the server stops.
        backlog: Connections that may wait to be accepted.
    """
    folder = tempfile.mkdtemp(prefix="lt4rec-sparse-serve-") if workers > 1 else ""
    if folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # before prometheus_client is imported, here and in workers
    os.environ[SETTINGS] = json.dumps(asdict(settings) | {"shared_folder": folder})
    import uvicorn

    try:
        uvicorn.run(
            "lt4rec_sparse.serve.worker:app",
            factory=True,
            host=host,
            port=port,
            workers=workers,
            access_log=False,
            server_header=False,
            backlog=backlog,
            timeout_keep_alive=75,  # longer than a balancer's minute, so that it is the one to close
            timeout_graceful_shutdown=stop_seconds,
            timeout_worker_healthcheck=10,  # while it loads, a worker can hold Python's lock for more than the usual 5
        )
        if folder and (Path(folder) / REFUSED).exists():
            raise SystemExit(STARTUP_FAILURE)  # uvicorn ends with 0 when its workers could not start
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def app() -> Any:
    """Return the application of this process, its model loaded and warmed up.

    Raises:
        SystemExit: If the artefact cannot be served, or the examples are none of its requests, after one line. One of
            several workers ends its process.
    """
    from lt4rec_sparse.serve.app import create_app
    from lt4rec_sparse.serve.service import LOG, Service

    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    service = Service(settings_from(os.environ[SETTINGS]))
    try:
        model = service.load()
        if model.examples_reason:
            raise InputError(model.examples_reason)
    except (InputError, OSError) as error:
        print(f"lt4rec-sparse: {error}", file=sys.stderr)  # noqa: T201  # as the command line says what it refuses
        if service.settings.shared_folder:
            (Path(service.settings.shared_folder) / REFUSED).touch()
            sys.stdout.flush()
            sys.stderr.flush()
            # At once: Python takes long to end, and a supervisor that asks a worker on its way out waits for an answer.
            os._exit(STARTUP_FAILURE)
        raise SystemExit(STARTUP_FAILURE) from error
    return create_app(service)


def settings_from(text: str) -> Settings:
    """Read settings that `run` wrote."""
    content = json.loads(text)
    return Settings(**{**content, "limits": Limits(**content["limits"])})
