"""How long `prepare` takes on logs of KuaiRand-27K's shape, and how much memory its process ever had, against rows.

Each log is written to a temporary folder and prepared by a process of its own. The high-water mark is the system's
`VmHWM`: resident memory, of which importing torch and Arrow is the first part.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import record
from bench.long_log import write_log
from lt4rec_sparse.recsys.tables import table

ROWS = (1_000_000, 3_000_000, 10_000_000, 30_000_000)
SHORT_ROWS = 20_000
NAME = "prepare"


def run(rows: tuple[int, ...]) -> str:
    """Measure logs of so many rows, put them beside those recorded, and return the path of `results/prepare.json`."""
    path = record.RESULTS / f"{NAME}.json"
    cases = {case["rows"]: case for case in record.read(NAME)["cases"]} if path.exists() else {}
    for count in rows:
        cases[count] = measured(count) | {"machine": record.machine()}
        record.write(NAME, {"cases": [cases[key] for key in sorted(cases)]})
    return str(path)


def measured(rows: int) -> dict[str, Any]:
    """Return bytes of the log and of what is prepared, seconds of each stage, and the high-water mark in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        log, out = Path(folder) / "log", Path(folder) / "out"
        write_log(log, rows)
        command = [sys.executable, "-m", "bench.prepare", str(log), str(out)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1])
        return {"rows": rows, "log_bytes": _bytes(log), **json.loads(done.stdout), "prepared_bytes": _bytes(out)}


def table_of(cases: list[dict[str, Any]]) -> str:
    """Return a row per length of log."""
    rows = [
        [
            f"{case['rows'] / 1e6:,.0f} million",
            f"{case['log_bytes'] / 1e9:.2f} GB",
            f"{case['prepared_bytes'] / 1e9:.2f} GB",
            f"{case['video_ids']:,}",
            f"{case['cpu_seconds'] / 60:.1f}",
            f"{case['rows'] / case['cpu_seconds']:,.0f}",
            f"{case['imported_bytes'] / 2**20:,.0f} MiB",
            f"{case['high_water_bytes'] / 2**20:,.0f} MiB",
        ]
        for case in cases
    ]
    sizes = ["rows", "CSV", "prepared", "known videos"]
    return table([*sizes, "minutes of one core", "rows per second of it", "at start", "peak"], rows)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _prepared(log: Path, out: Path) -> dict[str, Any]:
    from lt4rec_sparse.recsys.data import prepare

    begun, ends, start = time.perf_counter(), dict[str, float](), _high_water()
    prepared = prepare(log, out, progress=lambda stage, done, total: ends.update({stage: time.perf_counter() - begun}))
    ends.pop("duplicates dropped", None)
    spans = zip(ends.items(), [0.0, *ends.values()], strict=False)
    return {
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": time.process_time(),
        "stage_seconds": {stage: end - before for (stage, end), before in spans},
        "imported_bytes": start,
        "high_water_bytes": _high_water(),
        "video_ids": prepared.encoder.table_sizes["video_id"],
    }


def _high_water() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None  # Linux has it
    return int(found[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(_prepared(Path(sys.argv[1]), Path(sys.argv[2]))))
