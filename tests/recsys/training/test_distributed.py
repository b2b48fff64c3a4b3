"""Several processes take the steps of one: here threads that meet at a barrier; at the end what `torchrun` starts.

Parts of a batch are added in another order than the whole, so one process is compared in float64 and to what float32
would round away; what every process must have alike is compared to the bit.
"""

import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from oracle import UNIT_ROUNDOFF, Bounded, assert_exact, assert_rounding
from safetensors.torch import load_file

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.lottery import DropAndGrow, GradualPruning, random_masks
from lt4rec_sparse.paper.experiment import run_experiment
from lt4rec_sparse.paper.regimes import run_regimes
from lt4rec_sparse.recsys import frozen
from lt4rec_sparse.recsys.data import Batch, BatchStream
from lt4rec_sparse.recsys.harness import objectives
from lt4rec_sparse.recsys.harness.jobs import Job, run_jobs
from lt4rec_sparse.recsys.harness.settings import RunSettings, locked
from lt4rec_sparse.recsys.harness.study import Resources
from lt4rec_sparse.recsys.harness.trials import Training, Trial
from lt4rec_sparse.recsys.models import UncertaintyWeights, build
from lt4rec_sparse.recsys.models.balance import Conflict
from lt4rec_sparse.recsys.run import run
from lt4rec_sparse.recsys.training import (
    EarlyStopping,
    TaskAdam,
    averaged_model,
    current,
    distributed,
    evaluate,
    led,
    together,
    train,
)
from lt4rec_sparse.recsys.training.distributed import Ranks

KINDS = {"ctr": "binary", "cvr": "ratio"}
TASKS = tuple(KINDS)


class Meeting:
    """Where threads bring what they send, and see what the others brought."""

    def __init__(self, size: int) -> None:
        self.barrier, self.brought = threading.Barrier(size, timeout=60), [None] * size

    def of_all(self, rank: int, value: Any) -> list[Any]:
        self.brought[rank] = value
        self.barrier.wait()
        found = list(self.brought)
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class Thread(Ranks):
    """A thread that stands for a process."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def sum_(self, tensors):
        found = self.meeting.of_all(self.rank, [tensor.detach().clone() for tensor in tensors])
        for tensor, parts in zip(tensors, zip(*found, strict=True), strict=True):
            tensor.copy_(torch.stack(parts).sum(0))

    def sent(self, value, is_call=False):
        return pickle.loads(self.meeting.of_all(self.rank, pickle.dumps(value))[0])


def as_threads(size, call):
    """Return what a call returns in each of so many threads, given the processes for which they stand."""
    meeting = Meeting(size)

    def go(rank):
        try:
            return call(Thread(rank, size, meeting=meeting))
        except BaseException:
            meeting.barrier.abort()  # the others wait for this one
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(go, range(size)))


def side_by_side(size, call):
    """Return what a call returns in each of so many processes that make it together."""

    def go(ranks):
        with distributed._set(distributed._current, ranks):
            return call()

    return as_threads(size, go)


def trial(**settings) -> Trial:
    return Trial(settings.pop("model", "sparse_sharing"), TASKS, **settings)


OBJECTIVES = {
    "alternating": trial(),
    "scales, factors and focal loss": trial(
        training=Training(losses=(("ctr", "focal"),)), scales=(("cvr", 5.0),), conflict=Conflict()
    ),
    "joint": trial(objective="joint"),
    "uncertainty": trial(objective="uncertainty"),
    "pcgrad": trial(objective="pcgrad"),
    "esmm": trial(model="esmm"),
}


DRAWING = threading.Lock()  # threads share torch's generator


def new_model(log, name="sparse_sharing", sparse_gradients=False, tasks=TASKS):
    fields, sizes = log.encoder.fields, log.encoder.table_sizes
    with DRAWING:
        torch.manual_seed(0)
        model = build(name, fields, sizes, tasks, (16, 8), 4, sparse_gradients=sparse_gradients).double()
    if name == "sparse_sharing":
        shapes = model.mlp.mask(tasks[0]).shapes
        model.mlp.set_mask(random_masks(shapes, 0.5, tasks, torch.Generator().manual_seed(1)))
    return model


def steps_of(log, chosen: Trial, sparse_gradients, batches):
    """Take a step per batch; return the losses and the state of the model and of what its objective learned."""
    model = new_model(log, chosen.model, sparse_gradients)
    balance = UncertaintyWeights(TASKS, KINDS).double() if chosen.objective == "uncertainty" else None
    objective = objectives.of_trial(chosen, KINDS, balance)
    whole = torch.nn.ModuleList([model] + ([] if balance is None else [balance]))
    optimizer = TaskAdam(whole, dict.fromkeys(TASKS, 1e-2), clip_norm=0.05, weight_decay=0.1)
    losses = [loss for batch in batches for loss in objective.step(model, optimizer, batch).values()]
    return torch.stack(losses), whole.state_dict()


def doubled(batch: Batch) -> Batch:
    """In float64 all through: torch computes losses in the dtype of the labels."""
    labels, weights = ({t: v.double() for t, v in part.items()} for part in (batch.labels, batch.weights))
    return replace(batch, labels=labels, weights=weights)


class Doubled:
    """A stream of such batches."""

    def __init__(self, stream: BatchStream) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return len(self.stream)

    def epoch(self, number, start=0):
        return map(doubled, self.stream.epoch(number, start))


def uneven(log) -> list[Batch]:
    """A few batches, with weights that differ: among them one without conversions, and one of a single row."""
    batch = next(log.stream("train", 96, seed=1).epoch(0))
    batch = doubled(replace(batch, weights={task: 1 + torch.arange(batch.batch) % 3 for task in TASKS}))
    clicked, passed = batch.rows["cvr"].nonzero().flatten(), (~batch.rows["cvr"]).nonzero().flatten()
    parts = (torch.arange(batch.batch), passed[:7], clicked[:1])
    return [batch.take(rows) for rows in parts]


def assert_as_one(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """In float64 the order of a sum moves a weight, also past Adam's quotients, by less than float32 would round it."""
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        if value.is_floating_point():
            assert_rounding(got[name], Bounded(value, UNIT_ROUNDOFF[torch.float32] * value.abs()))
        else:
            assert torch.equal(got[name], value), name


@pytest.mark.parametrize("sparse_gradients", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_steps_on_parts_of_batches_are_those_of_one_process(small_log, kind, size, sparse_gradients):
    if kind == "pcgrad" and sparse_gradients:
        pytest.skip("refused: it projects dense gradients")
    batches = uneven(small_log)
    assert [int(batch.rows["cvr"].sum()) for batch in batches][1:] == [0, 1]
    go = partial(steps_of, small_log, OBJECTIVES[kind], sparse_gradients, batches)
    losses, wanted = go()
    (first, state), *others = side_by_side(size, go)
    assert_as_one({"losses": first}, {"losses": losses})
    assert_as_one(state, wanted)
    for other, of_other in others:
        assert torch.equal(other, first)
        assert all(torch.equal(of_other[name], value) for name, value in state.items())


def test_a_whole_training_is_that_of_one_process(small_log, tmp_path):
    def go():
        model, records = new_model(small_log), []
        validation = small_log.stream("validation", 512, shuffle=False)
        train(
            model,
            TaskAdam(model, {"ctr": 1e-3, "cvr": 2e-3}, clip_norm=0.05),
            Doubled(small_log.stream("train", 512, seed=3)),
            objectives.plain(Training(), TASKS, KINDS),
            epochs=2,
            checkpoint=tmp_path / "checkpoint.pt",
            checkpoint_every=3,
            log=records.append,
            averaged=averaged_model(model, 0.9),
            stopping=EarlyStopping(
                lambda judged: {"ctr": evaluate(judged, validation, KINDS)["all"]["ctr"]["log_loss"]}, patience=1
            ),
        )
        return model.state_dict(), evaluate(model, validation, KINDS, top_k=3), records

    (wanted, _, losses), (ours, *found) = go(), side_by_side(2, go)
    assert_as_one(ours[0], wanted)
    assert [{**record, "train_loss": 0} for record in ours[2]] == [{**record, "train_loss": 0} for record in losses]
    for state, judged, records in found:
        assert all(torch.equal(state[name], value) for name, value in ours[0].items())
        assert (judged, records) == ours[1:]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [2, 3])
def test_metrics_are_those_of_one_process_to_the_bit(small_log, size):
    """Each batch is computed whole, by one process, and all are added in order."""
    model = new_model(small_log).float()
    stream = small_log.stream("validation", 240, shuffle=False)
    assert len(stream) % size, "some batches are left over"
    wanted = evaluate(model, stream, KINDS, top_k=3)
    assert side_by_side(size, lambda: evaluate(model, stream, KINDS, top_k=3)) == [wanted] * size


def test_a_process_with_other_weights_is_noticed():
    def go():
        model = torch.nn.Linear(3, 2)
        torch.nn.init.ones_(model.weight)
        torch.nn.init.zeros_(model.bias)
        current().check_equal(model)
        with torch.no_grad():
            model.weight[1, 2] += current().rank * 2.0**-23  # the last bit
        with pytest.raises(RuntimeError, match="got other ones in process 1 than in process 0"):
            current().check_equal(model)
        return True

    assert side_by_side(2, go) == [True, True]


def test_a_gradient_that_some_processes_lack_is_summed_in_all():
    def go():
        model = torch.nn.ModuleList(
            [torch.nn.Linear(2, 1), torch.nn.Embedding(5, 2, sparse=True), torch.nn.Linear(1, 1)]
        )
        if current().rank == 1:
            (model[0](torch.ones(3, 2)).sum() + model[1](torch.tensor([3, 0, 3])).sum()).backward()
        current().sum_gradients(model)
        return [None if p.grad is None else p.grad.to_dense() for p in model.parameters()]

    for weight, bias, rows, *others in side_by_side(2, go):
        assert_exact(weight, torch.full((1, 2), 3.0))
        assert_exact(bias, torch.full((1,), 3.0))
        assert_exact(rows, torch.tensor([1.0, 0, 0, 2, 0]).unsqueeze(1).expand(5, 2))
        assert others == [None, None]


def test_an_error_of_the_first_process_ends_the_others():
    def fail():
        together(sorted, [2, 1])
        raise ZeroDivisionError

    def go(ranks):
        try:
            return distributed._shared(fail, ranks)
        except ZeroDivisionError:
            return "caught"

    assert as_threads(3, go) == ["caught", None, None]


def test_an_error_in_a_call_that_all_make_is_that_of_each():
    def go(ranks):
        try:
            return distributed._shared(lambda: together(sorted, [1, "a"]), ranks)
        except TypeError:
            return "caught"

    assert as_threads(2, go) == ["caught", "caught"]


def test_processes_that_have_not_joined_are_told_how(tmp_path, monkeypatch):
    monkeypatch.setattr("lt4rec_sparse.recsys.harness.settings.is_apart", lambda: True)
    refused = pytest.raises(InputError, match=r"another --out; processes of torchrun share one by .*led")
    with locked(tmp_path), refused, locked(tmp_path):
        pass


def test_a_process_alone_just_calls():
    assert led(lambda: together(sorted, [2, 1], reverse=True)) == [2, 1]
    assert current() == Ranks(0, 1)


def test_processes_that_share_trainings_run_no_others_beside():
    jobs = {"a": Job(os.getpid, ())}
    with distributed._set(distributed._joined, Ranks(0, 2)):
        assert run_jobs(jobs) == {"a": os.getpid()}
        with pytest.raises(InputError, match="got 3 workers under torchrun, wanted none"):
            run_jobs(jobs, workers=3)
        with pytest.raises(InputError, match="got ray under torchrun, wanted none"):
            run_jobs(jobs, executor="ray")


def test_workers_beside_torchrun_are_refused_before_a_folder_is_touched(tmp_path):
    out, resources = tmp_path / "out", Resources(workers=3)
    calls = (
        lambda: run(None, out, RunSettings(), resources=resources),
        lambda: run_experiment("table3", tmp_path / "absent", out, 1, resources=resources),
        lambda: run_regimes(out, 1, resources=resources),
    )
    with distributed._set(distributed._joined, Ranks(0, 2)):
        for call in calls:
            with pytest.raises(InputError, match="got 3 workers under torchrun, wanted none"):
                call()
    assert not out.exists()


@pytest.mark.parametrize("method", ["gradual", "drop_and_grow"])
def test_masks_that_move_while_a_model_trains_move_alike(small_log, method):
    """Masks are equal although sums differ in their last bits: these move no weight past another in its rank."""

    def go():
        model = new_model(small_log, tasks=("ctr",))
        optimizer, objective = TaskAdam(model, {"ctr": 1e-2}), objectives.plain(Training(), ("ctr",), KINDS)
        moving = GradualPruning(model.mlp, optimizer, density=0.2, every=2)
        if method == "drop_and_grow":
            loss = objectives.loss_on(objective, model, "ctr")
            moving = DropAndGrow(model.mlp, optimizer, loss, 0.2, torch.Generator().manual_seed(0), every=2)
        stream = Doubled(small_log.stream("train", 512, seed=3))
        train(model, optimizer, stream, objective, epochs=1, after_batch=moving.after_batch)
        return model.state_dict()

    wanted, (ours, others) = go(), side_by_side(2, go)
    assert_as_one(ours, wanted)
    assert all(torch.equal(others[name], value) for name, value in ours.items())


RANK = """
import os
import signal

from lt4rec_sparse.__main__ import main
from lt4rec_sparse.recsys import frozen
from lt4rec_sparse.recsys.harness import starts
from lt4rec_sparse.recsys.training import current

train, begun = starts.train, []


def first_dies(*arguments, before_batch, **named):
    begun.append(arguments)

    def check(done, total):
        if len(begun) == 4 and done == 5 and current().leads and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        before_batch(done, total)

    return train(*arguments, before_batch=check, **named | {"checkpoint_every": 2})


starts.train, frozen.ROUNDS = first_dies, 1
main()
"""


def torchrun(*arguments: str) -> str:
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def left_by(folder) -> dict[str, dict[str, torch.Tensor]]:
    """Return what trainings and searches left in a run folder: file -> tensors."""
    assert not list(folder.rglob("*.checkpoint.pt"))
    parts = ("singles", "searches", "trials")
    return {str(p.relative_to(folder)): load_file(p) for part in parts for p in (folder / part).rglob("*.safetensors")}


def masks_of(left):
    return {(file, name): t for file, named in left.items() for name, t in named.items() if not t.is_floating_point()}


SETTINGS = RunSettings(
    masks="tickets",
    rounds=1,
    density=0.2,
    granularity="weight",
    hidden=(16, 8),
    embedding_dim=4,
    ema=0.9,
    epochs=2,
    batch_size=512,
    clip_norm=0.05,
    sparse_gradients=True,
)
OPTIONS = (
    "--masks tickets --rounds 1 --density 0.2 --granularity weight --hidden 16,8 --embedding-dim 4 --ema 0.9 "
    "--epochs 2 --batch-size 512 --clip-norm 0.05 --sparse-gradients --precision fp32 --quiet"
)


@pytest.mark.heavy
def test_processes_find_the_masks_of_one_and_a_killed_one_changes_no_bit(small_folder, tmp_path, monkeypatch):
    """The first of torchrun's processes is killed, and all are started again.

    Threads that are not killed say what its files should hold, to the bit: they add the same two numbers. One process
    finds the same tickets, for the reason above; its trained weights differ where Adam divides.
    """
    monkeypatch.setattr(frozen, "ROUNDS", 1)
    killed, whole, alone = (tmp_path / name for name in ("killed", "whole", "alone"))
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    said = torchrun(str(script), "run", "--data", str(small_folder), "--out", str(killed), *OPTIONS.split())
    assert said.count("report.md") == 1, "the first process alone speaks"
    go = partial(run, small_folder, settings=SETTINGS, resources=Resources(executor="here"))
    as_threads(2, lambda ranks: distributed._shared(partial(go, whole), ranks))
    go(alone)
    found, wanted = left_by(killed), left_by(whole)
    assert found.keys() == wanted.keys()
    for file, tensors in wanted.items():
        assert all(torch.equal(found[file][name], tensor) for name, tensor in tensors.items()), file
    ours, wanted = masks_of(found), masks_of(left_by(alone))
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[key], mask) for key, mask in wanted.items())
