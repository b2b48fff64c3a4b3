"""`python -m tests.kernels.sanitize [quick | mutants COUNT]`: the engine under sanitizers.

Builds csrc/ without Python, with drivers of its own, once for each sanitizer, below `build/sanitize`, and runs it over
a wide set of networks and calls:

- address (AddressSanitizer, UndefinedBehaviorSanitizer): every network, kernel and batch against plain loops; a fuzz of
  prepack; calls from several threads; sizes and headers for which there is no memory. Then engine files with faults,
  of every precision and kind of embedding: each is refused with a message, or serves requests.
- thread (ThreadSanitizer): callers at the same time, each with a team of threads. `openmp.cpp` takes the place of
  GCC's OpenMP, which the sanitizer does not see through.
- release (no sanitizer, the optimisation of setup.py): every argument of every kernel between inaccessible pages, which
  finds what both sanitizers miss: gathers, vector loads, and an overrun from one piece of scratch memory into the next.

A silent sanitizer proves nothing, so each must also find the faults that the driver makes on purpose.

`quick` leaves out most networks, does not optimise, and guards the pages under AddressSanitizer instead. `mutants` runs
so many engine files with faults, and nothing else. Where the compiler lacks a sanitizer or the machine does not run it,
the exit code is 77 and the reason stands on stderr.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests import rankers

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CSRC = ROOT / "csrc"
FOLDER = ROOT / "build" / "sanitize"
NOT_HERE = 77
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
COMPILE = [
    "-std=c++17",
    "-g1",
    "-fopenmp",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
    f"-I{CSRC}",
]


class Build(NamedTuple):
    """One sanitizer, the driver's modes that it watches, and the faults that it must find."""

    name: str
    flags: tuple[str, ...]
    modes: tuple[str, ...]
    faults: dict[str, str]  # fault -> what the report on it contains
    has_own_openmp: bool = False
    file_modes: tuple[str, ...] = ()  # of the driver that opens engine files: how many with faults, or `threads`


ADDRESS = Build(
    "address",
    ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"),
    ("cases", "threads", "fuzz", "huge", "memory"),
    {
        "overrun": "AddressSanitizer: heap-buffer-overflow",
        "misaligned": "runtime error: load of misaligned address",
        "page": "AddressSanitizer: SEGV",
    },
)
THREAD = Build(
    "thread",
    ("-fsanitize=thread",),
    ("threads",),
    {"race": "ThreadSanitizer: data race", "team": "ThreadSanitizer: data race"},
    has_own_openmp=True,
    file_modes=("threads",),
)
RELEASE = Build("release", ("-O3",), ("guarded",), {"page": ""})
FULL = (
    ADDRESS._replace(flags=(*ADDRESS.flags, "-O1"), file_modes=("100000",)),
    THREAD._replace(flags=(*THREAD.flags, "-O1")),
    RELEASE,
)
QUICK = (
    ADDRESS._replace(name="address_quick", modes=(*ADDRESS.modes, "guarded"), file_modes=("2000",)),
    THREAD._replace(name="thread_quick"),
)

# Precision, embeddings, whether weights are kept in blocks, and the activation; every second one has nothing in common,
# and the last lacks tables.
SEEDS = (
    ("fp32", "fp32", False, "relu"),
    ("bf16", "fp16", False, "dice"),
    ("int8", "int8", False, "relu"),
    ("fp32", "fp16", True, "dice"),
    ("int8", "fp32", True, "relu"),
    ("fp32", "fp32", False, "dice"),
    ("int8", "int8", True, "relu"),
)

FILE_FAULTS = {
    ADDRESS.flags[0]: ("freed", "AddressSanitizer: heap-use-after-free"),
    THREAD.flags[0]: ("shared", "ThreadSanitizer: data race"),
}

ENVIRONMENT = {
    # The engine must survive a failed allocation; one above a gigabyte fails.
    "ASAN_OPTIONS": "allocator_may_return_null=1:max_allocation_size_mb=1024",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def main(arguments: list[str]) -> int:
    """Build and run; return the exit code."""
    is_for_mutants = len(arguments) == 2 and arguments[0] == "mutants" and arguments[1].isdecimal()
    if arguments not in ([], ["quick"]) and not is_for_mutants:
        sys.stderr.write("usage: python -m tests.kernels.sanitize [quick | mutants COUNT]\n")
        return 2
    effort = "quick" if arguments == ["quick"] else "full"
    builds = QUICK if arguments == ["quick"] else FULL
    if is_for_mutants:
        builds = (FULL[0]._replace(modes=(), faults={}, file_modes=(arguments[1],)),)
    for build in builds:
        reason = absence_of(build)
        if reason:
            sys.stderr.write(f"{build.name}: {reason}\n")
            return NOT_HERE
        sys.stdout.flush()
        driver = make(build)
        for mode in build.modes:
            done = run(driver, mode, effort)
            if done.returncode:
                sys.stderr.write(f"{build.name}: {mode} ended with {done.returncode}\n{done.stderr}")
                return 1
            sys.stdout.write(f"{build.name}: {done.stdout}")
        for fault, report in build.faults.items():
            done = run(driver, fault, effort)
            if done.returncode == 0 or report not in done.stderr:
                sys.stderr.write(f"{build.name}: did not find the fault {fault!r}\n{done.stderr}")
                return 1
        if build.faults:
            sys.stdout.write(f"{build.name}: found what is wrong with {', '.join(build.faults)}\n")
        if build.file_modes and not run_files(driver.with_name("mutants"), build):
            return 1
    return 0


def absence_of(build: Build) -> str:
    """Why this machine cannot build or run a program with these flags; empty where it can."""
    folder = FOLDER / build.name
    folder.mkdir(parents=True, exist_ok=True)
    source, program = folder / "probe.cpp", folder / "probe"
    source.write_text("int main() { return 0; }\n", encoding="utf-8")
    try:
        command = [*COMPILER, *build.flags, "-fopenmp", str(source), "-o", str(program)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        subprocess.run([program], check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        return str(error)
    except subprocess.CalledProcessError as error:
        return f"{shlex.join(map(str, error.cmd))} failed: {error.stderr.strip()[:500]}"
    return ""


def make(build: Build) -> Path:
    """Compile what has changed, two files at a time; return the driver, beside which `mutants` is."""
    folder = FOLDER / build.name
    programs = ("driver", "mutants")
    sources = [path for path in sorted(CSRC.glob("*.cpp")) if not path.name.startswith("module")]
    sources += [HERE / f"{program}.cpp" for program in programs]
    if build.has_own_openmp:
        sources.append(HERE / "openmp.cpp")
    newest_header = max(path.stat().st_mtime for path in [*CSRC.glob("*.h"), *HERE.glob("*.h"), Path(__file__)])
    objects = []
    commands = []
    for source in sources:
        objects.append(folder / f"{source.stem}.o")
        if objects[-1].exists() and objects[-1].stat().st_mtime > max(newest_header, source.stat().st_mtime):
            continue
        commands.append([*COMPILER, *COMPILE, *build.flags, "-c", str(source), "-o", str(objects[-1])])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(lambda command: subprocess.run(command, check=False), commands):
            done.check_returncode()
    openmp = [] if build.has_own_openmp else ["-fopenmp"]
    for program in programs:
        own = [str(path) for path in objects if path.stem not in programs or path.stem == program]
        command = [*COMPILER, *build.flags, *openmp, "-pthread", *own, "-o", str(folder / program)]
        subprocess.run(command, check=True)
    return folder / "driver"


def run_files(program: Path, build: Build) -> bool:
    """Open engine files, and make one fault that must be found; whether all was as it must be."""
    files = []
    for i, (precision, kind, blocks, activation) in enumerate(SEEDS):
        files.append(program.with_name(f"{i}.engine"))
        ranker = rankers.make(context=i % 2 == 0, kind=kind, precision=precision, blocks=blocks, activation=activation)
        if i == len(SEEDS) - 1:
            ranker = rankers.Ranker(ranker.encoder, ranker.inputs.without(["shop", "video"]), ranker.mlp)
        ranker.to_engine_file(files[-1])
    for mode in build.file_modes:
        done = run(program, mode, "0", *map(str, files))
        if done.returncode:
            sys.stderr.write(f"{build.name}: mutants {mode} ended with {done.returncode}\n{done.stderr}")
            return False
        sys.stdout.write(f"{build.name}: {done.stdout}")
    fault, report = FILE_FAULTS[build.flags[0]]
    done = run(program, fault, "0", str(files[0]))
    if done.returncode == 0 or report not in done.stderr:
        sys.stderr.write(f"{build.name}: did not find the fault {fault!r}\n{done.stderr}")
        return False
    return True


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [program, *arguments]
    return subprocess.run(command, env=os.environ | ENVIRONMENT, check=False, capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
