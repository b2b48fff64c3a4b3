"""`python -m bench SUITE`: measure a suite, keep the results of a run or an experiment, or write the pages' tables.

`--short` runs every line of a suite on small cases, once, and writes nothing: its times mean nothing.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from bench import (
    cpu,
    daily,
    default,
    embeddings,
    experiments,
    frozen,
    gpu,
    gpu_bytes,
    memory,
    networks,
    prepare,
    processes,
    record,
    request,
    serving,
    sparse_training,
    tables,
    training,
    wide,
)

USAGE = (
    "usage: python -m bench cpu [RUN_FOLDER | --short] | no-amx [--short] | wide [--short] | default [--short]"
    " | sparse-training [--short]"
    " | networks [NETWORK ... | --short] | frozen [--short] | gpu [--dry OUT] | gpu-bytes"
    " | training PREPARED_FOLDER [--short] | daily LOG_FOLDER [--short]"
    " | embeddings RUN_FOLDER [--short] | request RUN_FOLDER [--short]"
    " | serving RUN_FOLDER [--short] | soak RUN_FOLDER SECONDS"
    " | prepare [ROWS ... | --short] | processes PREPARED_FOLDER [--short]"
    " | keep RUN_FOLDER NAME | keep-experiment FOLDER NAME | commands COMMAND SECONDS ... | memory | tables"
)


def main(arguments: list[str]) -> int:
    """Run one suite; return the exit code."""
    match arguments:
        case ["cpu"]:
            cpu.run()
        case ["cpu", "--short"]:
            cpu.run(is_short=True)
        case ["cpu", run_folder]:
            cpu.run(Path(run_folder))
        case ["no-amx"]:
            cpu.run_without_amx()
        case ["no-amx", "--short"]:
            cpu.run_without_amx(is_short=True)
        case ["wide"]:
            wide.run()
        case ["wide", "--short"]:
            wide.run(is_short=True)
        case ["default"]:
            default.run()
        case ["default", "--short"]:
            default.run(is_short=True)
        case ["sparse-training"]:
            sparse_training.run()
        case ["sparse-training", "--short"]:
            sparse_training.run(is_short=True)
        case ["networks", "--short"]:
            networks.run(is_short=True)
        case ["networks", *names]:
            networks.run(names)
        case ["frozen"]:
            print(frozen.run())
        case ["frozen", "--short"]:
            print(json.dumps(frozen.measured(rounds=1, round_us=1.0), indent=1))
        case ["gpu", *options]:
            return gpu.main(options)
        case ["gpu-bytes"]:
            print(gpu_bytes.run())
        case ["training", prepared]:
            print(training.run(Path(prepared)))
        case ["training", prepared, "--short"]:
            print(json.dumps(training.measured(Path(prepared), steps=2, rounds=1), indent=1))
        case ["daily", data]:
            print(daily.run(Path(data)))
        case ["daily", data, "--short"]:
            print(json.dumps(daily.short(Path(data)), indent=1))
        case ["embeddings", run_folder]:
            print(embeddings.run(Path(run_folder)))
        case ["request", run_folder]:
            print(request.run(Path(run_folder)))
        case ["request", run_folder, "--short"]:
            print(json.dumps(request.measured(Path(run_folder), (1,), rounds=1, round_us=1.0), indent=1))
        case ["embeddings", run_folder, "--short"]:
            print(json.dumps(embeddings.measured(Path(run_folder), rows=100, rounds=1, round_us=1.0), indent=1))
        case ["serving", run_folder]:
            serving.run(Path(run_folder))
        case ["serving", run_folder, "--short"]:
            from bench import soak  # it needs aiohttp

            serving.run_short(Path(run_folder) / "model.safetensors")
            print(json.dumps(soak.measure(Path(run_folder) / "model.safetensors", seconds=3.0)))
        case ["soak", run_folder, seconds]:
            from bench import soak

            print(json.dumps(soak.measure(Path(run_folder) / "model.safetensors", float(seconds)), indent=1))
        case ["keep-experiment", folder, name]:
            print(experiments.keep(Path(folder), name))
        case ["keep", folder, name]:
            results = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
            results.pop("command", None)  # names folders of this machine
            print(record.write(name, {"machine": record.machine(), "results": results}))
            for plot in ("tickets", "latency"):
                shutil.copy(Path(folder) / "plots" / f"{plot}.png", record.RESULTS / f"{name}_{plot}.png")
        case ["commands", *timed]:
            commands = [{"command": c, "seconds": float(s)} for c, s in zip(timed[::2], timed[1::2], strict=True)]
            print(record.write("commands", {"machine": record.machine(), "commands": commands}))
        case ["prepare", "--short"]:
            print(json.dumps(prepare.measured(prepare.SHORT_ROWS), indent=1))
        case ["prepare", *rows]:
            print(prepare.run(tuple(map(int, rows)) or prepare.ROWS))
        case ["processes", prepared]:
            print(processes.run(Path(prepared)))
        case ["processes", prepared, "--short"]:
            print(json.dumps(processes.measured(Path(prepared), processes.SHORT, rounds=1)))
        case ["memory"]:
            print(memory.run())
        case ["tables"]:
            tables.write()
        case _:
            print(USAGE, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
