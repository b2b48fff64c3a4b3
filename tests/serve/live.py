"""A server in processes of its own, on loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]


class Live:
    """`lt4rec-sparse serve` at a free port.

    Attributes:
        url: Where it answers.
        log: The lines of JSON that it wrote.
    """

    def __init__(self, artefact: Path, *options: str) -> None:
        command = [sys.executable, "-m", "lt4rec_sparse", "serve", str(artefact), "--port", "0", *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.log: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self._readers = [threading.Thread(target=self._read, daemon=True)]
        assert self.process.stderr is not None
        lines = iter(self.process.stderr.readline, "")
        self.errors = []
        found = None
        while found is None:
            line = next(lines, None)
            assert line is not None, self.errors
            self.errors.append(line)
            found = re.search(r"running on (http://[\d.:]+)", line)
        self.url = found[1]
        self._readers.append(threading.Thread(target=self.errors.extend, args=(lines,), daemon=True))
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.log.append(json.loads(line))
                self._news.notify_all()

    def wait_for(self, event: str, times: int = 1) -> dict[str, Any]:
        """Return the log's line of an event, once it has that many."""

        def found() -> list[dict[str, Any]]:
            return [line for line in self.log if line["event"] == event]

        with self._news:
            assert self._news.wait_for(lambda: len(found()) >= times, timeout=60), (event, self.log, self.errors)
            return found()[times - 1]

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30)

    def post(self, path: str, content: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=content, timeout=30)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Return the exit code, with all that it wrote read."""
        code = self.process.wait(timeout=60)
        for reader in self._readers:
            reader.join(timeout=10)
        self.process.stdout.close()
        self.process.stderr.close()
        return code

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
