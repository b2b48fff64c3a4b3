"""liblt4rec.so as `make -C csrc` builds it, without Python, and the examples in C and Rust."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from c_ranker import Library, Model
from rankers import COLUMNS, make

from lt4rec_sparse import MaskedMLP, Ranker, freeze
from lt4rec_sparse.kernels import cpu
from lt4rec_sparse.ranker.features import FeatureEncoder, Schema
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "c"

pytestmark = [
    pytest.mark.c_library,
    pytest.mark.skipif(not cpu.is_available(), reason=f"no native engine: {cpu.absence_reason()}"),
]

SHOP = {
    "name": "shop",
    "context": ["city"],
    "files": {"log": ["log.csv"]},
    "time": {"day": "date"},
    "group": {"column": "user"},
    "columns": [
        {"name": "item", "type": "int"},
        {"name": "price", "kind": "dense"},
        {"name": "city"},
        {"name": "tags", "kind": "multi"},
    ],
    "tasks": [
        {"name": "ctr", "kind": "binary", "label": "click"},
        {"name": "cvr", "kind": "binary", "label": "buy"},
    ],
}
REQUEST = {"item": [7, 9, 11], "price": [3.5, None, 120.0], "city": ["Köln"], "tags": [["new", "red"], [], ["red"]]}


def need(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")


@pytest.fixture(scope="module")
def library() -> Path:
    need("make", "g++")
    subprocess.run(["make", "-s", "-j2", "-C", ROOT / "csrc"], check=True)
    return BUILD / "liblt4rec.so"


@pytest.fixture
def shop(tmp_path: Path) -> tuple[Ranker, Path]:
    log = {"item": [7, 9], "price": [1.0, 9.5], "city": ["Köln", "Ulm"], "tags": [["new"], ["red", "new"]]}
    encoder = FeatureEncoder.fit(Schema.from_dict(SHOP), [log])
    torch.manual_seed(0)
    inputs = CrossedEmbeddings(encoder.fields, encoder.table_sizes, dim=8, std=1.0)
    mlp = MaskedMLP(inputs.out_features, hidden=(32, 16), tasks=("ctr", "cvr"))
    ranker = Ranker(encoder, inputs, freeze(mlp, sigmoid=True))
    ranker.to_engine_file(tmp_path / "model.engine")
    return ranker, tmp_path / "model.engine"


def test_the_library_knows_no_python_and_shows_its_api_alone(library: Path) -> None:
    need("nm")
    listed = subprocess.run(["nm", "-D", library], check=True, capture_output=True, text=True).stdout.splitlines()
    undefined = [line.split()[-1] for line in listed if " U " in line]
    shown = {line.split()[-1] for line in listed if " T " in line}
    assert not [name for name in undefined if name.startswith(("Py", "_Py", "lt4rec"))]
    header = (ROOT / "csrc" / "lt4rec.h").read_text()
    assert shown and all(f" {name}(" in header.replace("*", "* ") for name in shown)
    assert len(shown) == header.count("LT4REC_API int ") + header.count("LT4REC_API const char* ")


def test_the_header_is_plain_c(tmp_path: Path) -> None:
    need("cc")
    (tmp_path / "plain.c").write_text('#include "lt4rec.h"\nint main(void) { return LT4REC_OK; }\n')
    flags = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["cc", *flags, tmp_path / "plain.c"], check=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_library_scores_as_the_ranker_does(library: Path, tmp_path: Path, precision: str) -> None:
    ranker = make(precision=precision)
    ranker.to_engine_file(tmp_path / "model.engine")
    model = Model(tmp_path / "model.engine", Library(library))
    columns = {name: values * 60 for name, values in COLUMNS.items()}
    scores = ranker.score(columns)
    assert (model.score(columns, 180, 2) == np.stack([scores["ctr"], scores["cvr"]], 1)).all()
    model.close()


def printed(program: Path, *arguments: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LD_LIBRARY_PATH": str(BUILD), "DYLD_LIBRARY_PATH": str(BUILD)}
    return subprocess.run([program, *arguments], env=environment, capture_output=True, text=True)


def assert_table_is_the_rankers(done: subprocess.CompletedProcess[str], ranker: Ranker) -> None:
    assert (done.returncode, done.stderr) == (0, "")
    head, *lines = done.stdout.splitlines()
    assert head.split()[-2:] == ["ctr", "cvr"]
    right = ranker.rank(REQUEST, k=2)
    for i, (item, rank_score, *scores) in enumerate(map(str.split, lines)):
        assert int(item) == REQUEST["item"][right.rows[i]]
        assert f"{float(rank_score):.9g}" == f"{right.rank_scores[i]:.9g}"
        assert [np.float32(score) for score in scores] == [right.scores["ctr"][i], right.scores["cvr"][i]]
    assert len(lines) == 2


def test_the_example_in_c_ranks_as_the_ranker_does(library: Path, tmp_path: Path, shop: tuple[Ranker, Path]) -> None:
    need("cc")
    source, program = ROOT / "examples" / "c" / "rank.c", tmp_path / "rank"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", f"-L{BUILD}"]
    subprocess.run(["cc", *flags, source, "-llt4rec", "-o", program], check=True)
    ranker, path = shop
    assert_table_is_the_rankers(printed(program, path), ranker)
    path.write_bytes(path.read_bytes()[:-1])
    done = printed(program, path)
    assert done.returncode == 1 and "bytes: got" in done.stderr


def test_the_example_in_rust_ranks_as_the_ranker_does(library: Path, tmp_path: Path, shop: tuple[Ranker, Path]) -> None:
    need("rustc")
    source, program = ROOT / "examples" / "rust" / "rank.rs", tmp_path / "rank"
    subprocess.run(["rustc", "-D", "warnings", source, "-L", BUILD, "-o", program], check=True)
    ranker, path = shop
    assert_table_is_the_rankers(printed(program, path), ranker)
    done = printed(program, path.with_name("absent"))
    assert done.returncode == 1 and "No such file" in done.stderr
