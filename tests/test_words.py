"""Plain English, and one word for one meaning: phrases that stop a reader, in every tracked text and source file.

The glossary is in CONTRIBUTING.md. A space in a pattern also matches a line break and the comment sign that follows it.
"""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = {".md", ".py", ".h", ".cpp", ".toml", ".sh"}

# Files and folders that are being rewritten. Empty this list.
PENDING: tuple[str, ...] = (
    "bench/cpu.py",
    "bench/gpu_serving.py",
    "bench/gpu_stopwatch.py",
    "bench/gpu_training.py",
    "bench/peers.py",
    "bench/training.py",
    "lt4rec_sparse/ranker/features/schema.py",
    "tests/nn/test_optim.py",
)

COUNTED = (
    "one|two|three|four|five|bits?|bytes|values|masks?|planes?|lines?|heads?|epochs?|steps?|rows?|columns|numbers?|copy|"
    "copies|rates?|weights|mlps?|models?|networks?|products|tiles|blocks|points?|entries|threads|quantiles?|"
    "launch|launches|microseconds|seconds|us|µs|ms|ns|kb|mb|gb|cycles|instructions|adam"
)
COUNTED_BY = (
    "task|row|layer|weight|request|call|step|seed|batch|epoch|column|tile|round|word|byte|head|register|cycle|user|"
    "video|group|case|candidate|level|process|chip|core|impression|trial"
)
# Where quantisation parameters occur; in csrc/ "codes" are quantised activations, and nothing else.
NUMERIC = ("lt4rec_sparse/kernels/", "lt4rec_sparse/nn/", "lt4rec_sparse/ops/", "tests/kernels/", "tests/nn/")


class Banned(NamedTuple):
    pattern: str
    say: str
    folders: tuple[str, ...] = ("",)  # where it is banned


# A pattern with a capital letter is case-sensitive.
BANNED = (
    Banned(rf"\b(?:{COUNTED}) an? (?:{COUNTED_BY})\b", 'per: "one mask per task"'),
    Banned(r"(?m:^)\s*[a-z_]+: Of ", "say what the argument is", ("bench/", "lt4rec_sparse/")),
    Banned(r"\bcontestants?\b(?!['\"])", "opponent, or what it is: a call, a chain"),
    Banned(r"\bpeers?\b", "opponent", ("README.md", "docs/", "CONTRIBUTING.md")),
    Banned(r"\b(?:slice_|table_)products\b|\bheader\.products\b|\buint64_t products\b", "multiply_adds"),
    Banned(r"\b(?:\d+|million|thousand) products\b|\bproducts of (?:the )?kept weights\b", "multiply-adds"),
    Banned(r"(?<!['\"`])\bcodes\b(?!['\"`])", "quantisation parameters, or quantised values", NUMERIC),
    Banned(r"\bquantiz\w+ codes\b|\bcodes (?:as good|of int8)\b|\.codes\b", "quantisation parameters"),
    Banned(r"\bwhat stands\b", "what is"),
    Banned(r"\bstands? (?:twice|there)\b", "appears, is"),
    Banned(
        r"\bWho (?:calls|wants|reads|lives|has|needs|is)\b(?![^.\n]*\?)", 'turn it round: "for repeated calls, ..."'
    ),
    Banned(r"\bwho (?:calls often|wants all|lives on)\b", 'turn it round: "for repeated calls, ..."'),
    Banned(r"\bas many are they\b", "as many as"),
    Banned(r"\b(?:is|are) (?:another|others)[.,;:]", "differs"),
    Banned(r"\bis not looked at\b", "is ignored"),
    Banned(r"\bhow int8 counts\b|\bcounts? the activations\b", "quantisation parameters of the activations"),
    Banned(r"\bwhat of an? \w+ (?:decides|still|is)\b|\bwhat of a ticket\b", "which part of"),
    Banned(r", (?:be|were) (?:it|they)\b", "even if"),
    Banned(r"\bas whose\b", "like that of"),
    Banned(r"\bof (?:its|these|those|their) \w+ the (?:mean|first|last|best)\b", "the mean of"),
    Banned(r"\blives in its own time\b|\bhappen to it\b", "say what is counted, and when"),
    Banned(r"\bin no one place\b", "in several places"),
    Banned(r"\bas the case may be\b|\btherein\b|\bthereof\b|\bhereby\b|\bwhereby\b", "plain words"),
    Banned(r"\bno more has\b|\bnor is it that\b|\bso does not\b", "plain word order"),
)
# File -> phrases that are right there.
ALLOWED = {
    "CHANGELOG.md": (".codes",),
    "CONTRIBUTING.md": ("peers",),  # the name of a file
    "bench/tables.py": ("model a task",),  # a key of committed records
    "lt4rec_sparse/recsys/data/history.py": (".codes",),  # of distinct bags
    "lt4rec_sparse/kernels/gpu/block_sparse.py": ("times a weight",),
    "tests/kernels/gpu/ahead_of_time.py": ("codes",),  # compiled code
}


def tracked() -> list[str]:
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [
        name
        for name in listed.splitlines()
        if Path(name).suffix in SUFFIXES
        and not name.startswith("bench/results/")  # measured by the code of their commit
        and name != "tests/test_words.py"
        and (ROOT / name).exists()
    ]


def hits(name: str, text: str) -> list[str]:
    found = []
    for banned in BANNED:
        if not name.startswith(banned.folders):
            continue
        gap = r"(?:[ \t]*\n[ \t]*(?:#|//|\*|>)?[ \t]*|[ \t]+)"
        flags = re.IGNORECASE if banned.pattern == banned.pattern.lower() else 0
        for match in re.finditer(banned.pattern.replace(" ", gap), text, flags):
            phrase = " ".join(match[0].split())
            if phrase not in ALLOWED.get(name, ()):
                found.append(f"{name}:{text.count(chr(10), 0, match.start()) + 1}: got {phrase!r}, wanted {banned.say}")
    return found


FILES = tracked()


@pytest.mark.skipif(not FILES, reason="no git checkout")
@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith(PENDING)])
def test_plain_words(name):
    found = hits(name, (ROOT / name).read_text(encoding="utf-8"))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "one mask a task",
        "a bit a\n// weight",
        "# 2 bytes a\n    # row",
        "What stands in the padding",
        "Who calls often makes one",
        "64 products",
        "the contestants of a case",
        "If a dtype is another.",
    ],
)
def test_the_list_catches(text):
    assert hits("csrc/any.h", text)


@pytest.mark.parametrize(
    "text",
    [
        "takes a row, reads a weight, times a call",
        "once a batch size needs it",
        '{"contestants": 1, "codes": 2}',
        "a matrix product is one operation, dot products",
        "Who is it for?",
        "the exit code",
        "this is another one",
    ],
)
def test_the_list_lets_pass(text):
    assert not hits("csrc/any.h", text)
