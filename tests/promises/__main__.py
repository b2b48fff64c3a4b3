"""`python -m tests.promises PROMISE`: try what docs/promises.md says of files, for as long as one likes.

artefacts, modules, plans: mutants, by number (`--first`, `--count`); each is refused by one line, or served and right.
crashes: every state in which a power cut may leave a file that is being saved. kills: real ones (`--count`).
memory: what loading large artefacts takes. served: the scores of a run's artefact (`--run`) over its test days.

`--keep` puts the record beside those of other promises, in bench/results/promises.json; `python -m bench tables` then
rewrites the page. The exit code is 1 where a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench import record
from tests.promises import crashes, kills, memory, mutation, served
from tests.promises.judges import SUBJECTS

NAME = "promises"


def main(arguments: list[str]) -> int:
    """Try one promise; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.promises", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("promise", choices=[*SUBJECTS, "crashes", "kills", "memory", "served"])
    parser.add_argument("--count", type=int, help="mutants (10,000), kills (50) or rows (all)")
    parser.add_argument("--run", type=Path, help="the folder of a run, of which the artefact is served")
    parser.add_argument("--first", type=int, default=0, help="the number of the first mutant")
    parser.add_argument("--processes", type=int, default=1, help="that judge mutants")
    parser.add_argument("--keep", action="store_true", help="write the record")
    chosen = parser.parse_args(arguments)
    found: dict[str, Any]
    if chosen.promise in SUBJECTS:
        found = mutation.run(chosen.promise, chosen.first, chosen.count or 10_000, chosen.processes)
        is_kept = not found["failures"]
    elif chosen.promise == "crashes":
        found = {kind: {"states": states, "broken": wrong} for kind, (states, wrong) in crashes.run().items()}
        is_kept = not any(of_kind["broken"] for of_kind in found.values())
    elif chosen.promise == "kills":
        found = kills.run(chosen.count or 50)
        is_kept = not found["neither old nor new"] and not found["left beside the next save"]
    elif chosen.promise == "served":
        if chosen.run is None:
            parser.error("served: got no --run, wanted the folder of a run")
        found = served.run(chosen.run, chosen.count)
        is_kept = True  # the first wrong score ends it
    else:
        found = memory.run()
        is_kept = all(of_case["peak_bytes"] <= 2 * of_case["file_bytes"] for of_case in found.values())
    print(json.dumps(found, indent=1))
    if chosen.keep:
        path = record.RESULTS / f"{NAME}.json"
        records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        records[chosen.promise] = {"machine": record.machine(), "found": found}
        record.write(NAME, dict(sorted(records.items())))
    return 0 if is_kept else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
