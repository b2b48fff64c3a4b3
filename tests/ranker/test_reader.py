"""docs/artefact.md is enough to read a file: a reader that was written from it scores as the package does."""

import ast
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lt4rec_sparse import load, save
from lt4rec_sparse.checked_file import ArtefactError
from tests.ranker import reader as reader_file
from tests.ranker.agreement import assert_agrees, bounded_scores
from tests.ranker.reader import Reader, hashed

HERE = Path(__file__).parent
VERSIONS = (1, 2, 3, 4, 5, 6)


def golden(version):
    path = HERE / f"artefact_v{version}.safetensors"
    expected = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    given = {column: np.array(rows, np.float32) for column, rows in expected.get("embeddings", {}).items()}
    return path, expected["candidates"], given


def test_it_knows_nothing_of_the_package():
    tree = ast.parse(Path(reader_file.__file__).read_text(encoding="utf-8"))
    imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imports |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in imports if name.partition(".")[0] not in sys.stdlib_module_names} == {"numpy"}


@pytest.mark.parametrize("version", VERSIONS)
def test_both_readers_score_alike(version):
    path, candidates, given = golden(version)
    reader = Reader(path.read_bytes())
    assert reader.meta["version"] == version
    assert_agrees(load(path).score(candidates, given), bounded_scores(reader, candidates, given))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
def test_and_so_does_what_is_written_now(version, kind, tmp_path):
    path, candidates, given = golden(version)
    ranker = load(path)
    without = {1: ["video_id", "tags"], 2: [], 3: ["words"], 4: ["tags"], 5: ["tags"], 6: ["tags"]}[version]
    features = ranker.encoder.encode(candidates, {column: len(rows) for column, rows in given.items()})
    vectors = ranker.inputs.embed(features, {column: torch.from_numpy(rows) for column, rows in given.items()})
    elsewhere = {
        field.column: vectors[:, i].numpy() for i, field in enumerate(ranker.inputs._ordered) if field.table in without
    }
    save(ranker, tmp_path / "m.safetensors", kind, without=without)
    reader = Reader((tmp_path / "m.safetensors").read_bytes())
    scores = load(tmp_path / "m.safetensors").score(candidates, elsewhere)
    assert_agrees(scores, bounded_scores(reader, candidates, elsewhere))


def test_the_comparison_sees_a_bit_of_a_plane_and_the_order_of_pairs():
    """It would pass for anything if its bound were too wide."""
    path, candidates, given = golden(3)
    scores, reader = load(path).score(candidates, given), Reader(path.read_bytes())
    planes = reader.tensors["layers.0.bitmask"].copy()
    planes[0, 2, 1] ^= 1 << int(np.flatnonzero(np.unpackbits(planes[0, 2, 1], bitorder="little"))[0])
    reader.tensors["layers.0.bitmask"] = planes
    with pytest.raises(AssertionError, match="rounding bound"):
        assert_agrees(scores, bounded_scores(reader, candidates, given))
    reader = Reader(path.read_bytes())
    reader.fields[0], reader.fields[1] = reader.fields[1], reader.fields[0]
    with pytest.raises(AssertionError, match="rounding bound"):
        assert_agrees(scores, bounded_scores(reader, candidates, given))


def test_hashes_are_those_of_the_page():
    # The first three outputs of splitmix64 from seed 0, and BLAKE2b-64 of "abc".
    gamma = 0x9E3779B97F4A7C15
    of_page = [hashed(k * gamma % 2**64) for k in range(3)]
    assert of_page == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert hashed("abc") == int.from_bytes(bytes.fromhex(hashlib.blake2b(b"abc", digest_size=8).hexdigest()), "little")


@pytest.mark.parametrize("version", [1, 3])  # before there were digests, and with them
def test_a_flipped_byte_names_its_tensor(version, tmp_path):
    content = bytearray(golden(version)[0].read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, entry in header.items():
        begin, end = entry.get("data_offsets", (0, 0))
        if begin == end:
            continue
        place = 8 + length + (begin + end) // 2
        content[place] ^= 16
        (tmp_path / "m.safetensors").write_bytes(content)
        named = rf" \(tensor '{name}'\)" if version == 3 else ""
        with pytest.raises(ArtefactError, match=rf"do not match their checksum{named}, wanted"):
            load(tmp_path / "m.safetensors")
        with pytest.raises(ValueError, match=name):
            Reader(bytes(content))
        content[place] ^= 16
