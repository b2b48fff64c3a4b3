import re
from itertools import islice

import pytest
import torch

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.lottery import random_masks
from lt4rec_sparse.nn.optim import MaskedAdam
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.recsys.data import Prepared
from lt4rec_sparse.recsys.metrics import AUC, MSE
from lt4rec_sparse.recsys.models import HardSharing, SparseSharing, loss_of
from lt4rec_sparse.recsys.stored import load_checkpoint
from lt4rec_sparse.recsys.training import (
    Alternating,
    EarlyStopping,
    Schedule,
    TaskAdam,
    TaskLosses,
    averaged_model,
    evaluate,
    train,
)

KINDS = {"ctr": "binary", "cvr": "ratio"}
LOSSES = {task: loss_of(kind) for task, kind in KINDS.items()}
ALTERNATING = Alternating(TaskLosses(LOSSES))


def new_model(prepared: Prepared, kind=SparseSharing, tasks=("ctr", "cvr"), sparse_gradients=False):
    torch.manual_seed(0)
    encoder = prepared.encoder
    inputs = CrossedEmbeddings(encoder.fields, encoder.table_sizes, dim=4, sparse_gradients=sparse_gradients)
    model = kind(inputs, tasks, (16, 8))
    if kind is SparseSharing:
        shapes = model.mlp.mask(tasks[0]).shapes
        model.mlp.set_mask(random_masks(shapes, 0.5, tasks, torch.Generator().manual_seed(1)))
    return model


def states_equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_training_learns(small_log):
    model = new_model(small_log)
    validation = small_log.stream("validation", 512, shuffle=False)
    before = evaluate(model, validation, KINDS)["all"]
    records = []
    stream = small_log.stream("train", 128, seed=0)
    train(model, MaskedAdam(model, 3e-3), stream, ALTERNATING, epochs=2, log=records.append)
    after = evaluate(model, validation, KINDS)["all"]
    assert after["ctr"]["auc"] > max(before["ctr"]["auc"], 0.55)
    assert after["cvr"]["mse"] < before["cvr"]["mse"]
    assert [(r["task"], r["epoch"]) for r in records] == [("ctr", 0), ("cvr", 0), ("ctr", 1), ("cvr", 1)]
    assert records[2]["train_loss"] < records[0]["train_loss"]


class MachineGoneError(Exception):
    """Stands for a machine that goes away."""


@pytest.mark.parametrize("is_plain", [True, False])
@pytest.mark.parametrize("sparse_gradients", [False, True])
@pytest.mark.parametrize("patience", [0, 1])
@pytest.mark.parametrize("stop_after", [1, 4, 5, 11])
def test_a_resumed_training_ends_bit_for_bit_where_an_uninterrupted_does(
    small_log, tmp_path, stop_after, patience, sparse_gradients, is_plain
):
    def go(model, checkpoint, stop=None):
        def after_batch(batch, done, total):
            if done == stop:
                raise MachineGoneError

        stream = small_log.stream("train", 512, seed=3)
        assert 4 < len(stream) < 9, "the stops above stand for the first epoch, its end and the second"
        records = []
        optimizer, schedule = MaskedAdam(model), Schedule("cosine", warm_up_steps=3)
        if not is_plain:
            optimizer = TaskAdam(model, {"ctr": 1e-3, "cvr": 2e-3}, clip_norm=0.05, weight_decay=0.1)

        def before_batch(done, total):
            optimizer.factor = schedule.factor(done, total)

        train(
            model,
            optimizer,
            stream,
            ALTERNATING,
            epochs=2,
            before_batch=before_batch,
            averaged=None if is_plain else averaged_model(model, 0.9),
            checkpoint=checkpoint,
            checkpoint_every=2,
            log=records.append,
            after_batch=after_batch,
            stopping=EarlyStopping(distance, patience) if patience else None,
        )
        return records

    start = [p.detach().clone() for p in new_model(small_log).parameters()]

    def distance(model):  # grows, so that the first epoch is the best
        return {
            "ctr": sum(float((p.detach() - q).square().sum()) for p, q in zip(model.parameters(), start, strict=True))
        }

    whole, cut, resumed = (new_model(small_log, sparse_gradients=sparse_gradients) for _ in range(3))
    records = go(whole, None)
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(MachineGoneError):
        go(cut, checkpoint, stop_after)
    assert go(resumed, checkpoint)[-2:] == records[-2:]
    assert states_equal(whole, resumed)
    assert not checkpoint.exists()


def test_with_sparse_gradients_training_learns_and_moves_what_it_looks_up_alone(small_log):
    model, validation = new_model(small_log, sparse_gradients=True), small_log.stream("validation", 512, shuffle=False)
    before, start = evaluate(model, validation, KINDS)["all"], model.inputs.embedding.detach().clone()
    stream, seen = small_log.stream("train", 128, seed=0), torch.zeros(len(start), dtype=torch.bool)

    def see(batch, done, total):
        starts, n_single = model.inputs.table_starts, batch.features.single.shape[1]
        seen[batch.features.single + starts[:n_single]] = True
        ends = batch.features.multi_offsets[batch.batch :: batch.batch]
        bags = torch.repeat_interleave(starts[n_single:], ends.diff(prepend=ends.new_zeros(1)))
        seen[batch.features.multi_values + bags] = True

    train(model, MaskedAdam(model, 3e-3), stream, ALTERNATING, epochs=1, after_batch=see)
    moved = (model.inputs.embedding != start).any(1)
    assert torch.equal(moved, seen), "every row looked up has a gradient, no other moves"
    assert not seen.all()
    after = evaluate(model, validation, KINDS)["all"]
    assert after["ctr"]["auc"] > max(before["ctr"]["auc"], 0.55)
    assert after["cvr"]["mse"] < before["cvr"]["mse"]


def test_a_step_for_one_task_leaves_the_other_tasks_weights_alone(small_log):
    model = new_model(small_log)
    before = {name: w.detach().clone() for name, w in model.mlp.masked_weights().items()}
    head = model.mlp.heads["cvr"].weight.detach().clone()
    train(
        model,
        MaskedAdam(model),
        small_log.stream("train", 512),
        Alternating(TaskLosses({"ctr": LOSSES["ctr"]})),
        epochs=1,
    )
    for name, weight in model.mlp.masked_weights().items():
        kept = model.mlp.mask("ctr")[name]
        assert torch.equal(weight[~kept], before[name][~kept])
        assert not torch.equal(weight[kept], before[name][kept])
    assert torch.equal(model.mlp.heads["cvr"].weight, head)


def test_hard_sharing_has_an_mlp_of_its_own_for_each_task(small_log):
    model = new_model(small_log, HardSharing)
    other = [p.detach().clone() for p in model.mlps["cvr"].parameters()]
    shared = model.inputs.embedding.detach().clone()
    train(
        model,
        MaskedAdam(model),
        small_log.stream("train", 2048),
        Alternating(TaskLosses({"ctr": LOSSES["ctr"]})),
        epochs=1,
    )
    assert all(torch.equal(a, b) for a, b in zip(model.mlps["cvr"].parameters(), other, strict=True))
    assert not torch.equal(model.inputs.embedding, shared)


@pytest.mark.parametrize("kind", [SparseSharing, HardSharing])
def test_all_tasks_at_once_equal_each_task_alone(small_log, kind):
    model = new_model(small_log, kind)
    features = next(small_log.stream("test", 64, shuffle=False).epoch(0)).features
    every = model(features)
    for i, task in enumerate(model.tasks):
        assert torch.equal(every[:, i : i + 1], model(features, task))


def test_evaluation_is_by_slice_and_over_the_tasks_own_rows(small_log):
    model = new_model(small_log).eval()
    result = evaluate(model, small_log.stream("test", 100, shuffle=False), KINDS)
    (batch,) = small_log.stream("test", 1 << 20, shuffle=False).epoch(0)
    with torch.inference_mode():
        logits = {task: model(batch.features, task).squeeze(1).double().numpy() for task in KINDS}
    for part in result:
        inside = torch.ones(batch.batch, dtype=torch.bool) if part == "all" else batch.slices[part]
        for task, metric, key in (("ctr", AUC(), "auc"), ("cvr", MSE(), "mse")):
            rows = (inside & batch.rows[task]).numpy()
            metric.update(logits[task][rows], batch.labels[task].double().numpy()[rows], batch.groups.numpy()[rows])
            assert abs(result[part][task][key] - metric.compute()) < 1e-5
    assert set(result) == {"all", *batch.slices}


def test_a_loss_that_is_no_number_names_batch_and_task(small_log):
    model = new_model(small_log)
    model.inputs.embedding.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="loss of ctr: got nan in epoch 0, batch 0"):
        train(model, MaskedAdam(model), small_log.stream("train", 128), ALTERNATING, epochs=1)


def test_a_batch_without_rows_of_a_task_gives_that_task_no_step(small_log):
    class OnlyUnclicked:
        def __len__(self):
            return 2

        def epoch(self, number, start=0):
            for batch in islice(small_log.stream("train", 256, seed=0).epoch(number), start, 2):
                yield batch.take((~batch.rows["cvr"]).nonzero().squeeze(1))

    model = new_model(small_log)
    head = model.mlp.heads["cvr"].weight.detach().clone()
    records = []
    train(model, MaskedAdam(model), OnlyUnclicked(), ALTERNATING, epochs=1, log=records.append)
    assert torch.equal(model.mlp.heads["cvr"].weight, head)
    assert [(r["task"], r["batches"], r["train_loss"] is None) for r in records] == [
        ("ctr", 2, False),
        ("cvr", 0, True),
    ]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"{",
        lambda content: content[:-9],
        lambda content: content.replace(b"\x00\x00\x80?" * 9, b"\x00\x00\x81?" * 9),  # ones, in the middle of a tensor
        lambda content: content.replace(b"model", b"modal"),  # in the pickle
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    path = tmp_path / "x.checkpoint.pt"
    torch.save({"model": {"a": torch.ones(200)}}, path)
    whole = path.read_bytes()
    assert torch.equal(load_checkpoint(path)["model"]["a"], torch.ones(200))
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: got a damaged file .*: delete it to go on$"):
        load_checkpoint(path)


def test_a_checkpoint_with_an_altered_directory_is_named_or_read_as_it_was(tmp_path):
    """No checksum is over the archive's directory, which says where a part is, how it is packed, and what it is."""
    path = tmp_path / "x.checkpoint.pt"
    torch.save({"model": {"a": torch.ones(200)}}, path)
    whole = path.read_bytes()
    refused = 0
    for place in range(whole.index(b"PK\x01\x02"), len(whole)):
        for flip in (1 << place % 8, 0x10, 0xFF):  # 0x10 makes a folder of a part
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            try:
                state = load_checkpoint(path)
            except InputError as error:
                assert re.fullmatch(
                    rf"{re.escape(str(path))}: got a damaged file [^\n]*: delete it to go on", str(error)
                )
                refused += 1
            else:
                assert torch.equal(state["model"]["a"], torch.ones(200)), f"byte {place}, flipped by {flip}"
    assert refused > 500
