"""The promises about files, tried for a short time; `python -m tests.promises` tries them for a long one."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lt4rec_sparse import MaskedMLP, Ranker, SparseMLP, freeze, load, load_module, save, save_module
from lt4rec_sparse.kernels import cpu
from lt4rec_sparse.lottery import random_masks
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from tests.promises import bases, crashes, judges, memory, mutants, mutation, served
from tests.ranker.reader import Reader

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not cpu.is_available(), reason="the scores are the engine's, to the bit")
@pytest.mark.parametrize("blocks", [False, True])
def test_what_is_served_is_what_was_trained(small_log, tmp_path, blocks):
    torch.manual_seed(0)
    inputs = CrossedEmbeddings(small_log.encoder.fields, small_log.encoder.table_sizes, dim=4, std=0.3)
    mlp = MaskedMLP(inputs.out_features, (32, 16), tasks=("ctr", "cvr"))
    shapes, generator = mlp.mask("ctr").shapes, torch.Generator().manual_seed(0)
    for task, mask in random_masks(
        shapes, 0.3, mlp.tasks, generator, granularity="16x4" if blocks else "weight"
    ).items():
        mlp.set_mask(mask, task)
    frozen = freeze(mlp, sigmoid=True).calibrated(torch.randn(200, inputs.out_features))
    save(Ranker(small_log.encoder, inputs, frozen), tmp_path / "model.safetensors")
    (tmp_path / "data").symlink_to(small_log.folder)
    found = served.run(tmp_path, 300)
    assert found["rows"] >= 300 and 0 < found["requests"] <= found["rows"]
    assert found["precisions"] == ["fp32", "bf16", "int8"] and found["scores"] > 6 * found["rows"]


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "count"), [("artefacts", 8_000), ("modules", 3_000), ("plans", 3_000)])
def test_a_malformed_file_is_refused_or_served_and_right(name, count):
    found = mutation.run(name, 0, count)
    assert not found["failures"]
    # Not all of them, nor none: else the mutants would try little.
    assert count / 20 < found["verdicts"][judges.SERVED] < count / 2
    assert count / 2 < found["verdicts"][judges.REFUSED]


@pytest.mark.parametrize("name", judges.SUBJECTS)
def test_what_the_mutants_are_made_from_is_served_and_right(name, tmp_path):
    subject, rng = judges.SUBJECTS[name](), random.Random(0)
    files = [mutants.put_together(base) for base in subject.bases] if name != "plans" else [subject.whole()]
    for content in files:
        assert subject.judge(tmp_path / f"file.{subject.suffix}", content, rng) == judges.SERVED


@pytest.mark.parametrize("name", judges.SUBJECTS)
def test_a_mutant_follows_from_its_number(name):
    first, second = judges.SUBJECTS[name](), judges.SUBJECTS[name]()
    for number in range(50):
        assert first.mutant(random.Random(number)) == second.mutant(random.Random(number))


def test_a_wrong_error_and_a_long_message_are_failures(tmp_path, monkeypatch):
    """What judges mutants sees what it looks for."""
    subject, path = judges.Artefacts(), tmp_path / "m.safetensors"
    content = mutants.put_together(subject.bases[0])
    for what, error in (
        (lambda path, precision: 1 / 0, ZeroDivisionError),
        (lambda path, precision: raised(f"{path}: {'x' * 1000}"), AssertionError),
        (lambda path, precision: raised("another file: got nothing"), AssertionError),
    ):
        monkeypatch.setattr(judges, "load", what)
        with pytest.raises(error):
            subject.judge(path, content, random.Random(1))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_wrong_score_is_a_failure_in_every_precision(tmp_path, monkeypatch, precision):
    subject, path = judges.Artefacts(), tmp_path / "m.safetensors"
    seed = next(seed for seed in range(100) if random.Random(seed).choice(judges.PRECISIONS) == precision)

    def altered(path, precision="fp32"):
        ranker = load(path, precision)
        ranker.inputs.embedding.data = ranker.inputs.embedding.data.flip(0)
        return ranker

    content = mutants.put_together(subject.bases[0])
    assert subject.judge(path, content, random.Random(seed)) == judges.SERVED
    monkeypatch.setattr(judges, "load", altered)
    with pytest.raises(AssertionError, match="rounding bound"):
        subject.judge(path, content, random.Random(seed))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_wrong_result_of_a_module_is_a_failure_in_every_precision(tmp_path, monkeypatch, precision):
    subject, path = judges.Modules(), tmp_path / "m.safetensors"
    made = tmp_path / "made.safetensors"
    path.write_bytes(mutants.put_together(subject.bases[0]))
    network = load_module(path).network
    save_module(SparseMLP(network).calibrated(torch.randn(20, network.in_features)).to_precision(precision), made)
    content = made.read_bytes()
    assert subject.judge(path, content, random.Random(0)) == judges.SERVED
    monkeypatch.setattr(SparseMLP, "forward", lambda self, x, forward=SparseMLP.forward: forward(self, x).flip(1))
    with pytest.raises(AssertionError, match="rounding bound"):
        subject.judge(path, content, random.Random(0))


def raised(message):
    raise judges.ArtefactError(message)


def test_small_artefacts_are_of_every_version_and_kind():
    files = [Reader(mutants.put_together(file)) for file in bases.artefacts()]
    assert {reader.meta["version"] for reader in files} == {1, 2, 3, 4, 5, 6}
    assert {str(reader.tensors["inputs.embedding"].dtype) for reader in files} == {"float32", "float16", "int8"}
    assert {field.kind for reader in files for field in reader.fields} == {"single", "multi", "dense"}
    assert {field.encoding for reader in files for field in reader.fields} == {"vocabulary", "hash"}
    assert {field.kind for reader in files for field in reader.numbers} == {"dense", "vector"}
    assert any(field.target and field.last for reader in files for field in reader.fields)
    assert any("without" in reader.meta for reader in files)
    assert any("layers.0.slope" in reader.tensors for reader in files)


@pytest.mark.heavy
def test_no_crash_leaves_a_broken_file_or_a_temporary():
    for name, (states, wrong) in crashes.run().items():
        assert states > 10, name
        assert not wrong, name


@pytest.mark.parametrize(("write", "states_and_broken"), [(crashes.in_place, [5, 3]), (crashes.without_sync, [11, 4])])
def test_careless_saves_are_seen_to_break(tmp_path, write, states_and_broken):
    """As docs/promises.md says."""
    folder = tmp_path / "disk"
    folder.mkdir()
    target = folder / "file"
    write(target, 0)
    old = target.read_bytes()
    moments = crashes.recorded(folder, lambda: write(target, 1))
    allowed = (old, target.read_bytes())
    found = crashes.broken(
        folder, moments, lambda: target.exists() and target.read_bytes() in allowed, lambda: write(target, 1)
    )
    assert found == states_and_broken


@pytest.mark.heavy
def test_kills_leave_a_whole_file():
    """In a process of its own, which forks."""
    command = [sys.executable, "-W", "error", "-m", "tests.promises", "kills", "--count", "50"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.heavy
def test_loading_takes_at_most_twice_the_file():
    for name, found in memory.run(0.2).items():
        assert found["peak_bytes"] <= 2 * found["file_bytes"], f"{name}: {found}"
