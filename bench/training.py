"""How fast training is: steps beside another library, the mask search, joint training, and large tables.

The opponent is torch-rechub's MMoE (`pip install torch-rechub`), with the same rows, fields, embedding and expert
widths, optimiser and batch. Its layers are its own: batch normalisation in every MLP, one lookup per field. It is timed
as its users run it, `MTLTrainer` over its `DataGenerator`, and again on batches made before the clock starts, which
favours it. Ours runs its whole loop, including the making of batches and labels, and wide logits as well.

The plain loop is Algorithm 1 as in every public implementation: each round reads the files again, multiplies by dense
`weight * mask` in float32 with torch's Adam over every weight, one task after another, and trains the single-task
baselines separately.

Joint training of sparse sharing is timed as a whole, by dense steps and by those of kept weights alone.

A step of embeddings alone, in a large table: `MaskedAdam` with dense gradients and with sparse ones, beside
`torch.optim.SparseAdam`. Lookup, gradient and step are timed together.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import record
from lt4rec_sparse.nn.optim import MaskedAdam
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.recsys.data import Batch, Prepared
from lt4rec_sparse.recsys.harness.jobs import DATA, jobs_of, run_jobs
from lt4rec_sparse.recsys.harness.laboratory import Laboratory
from lt4rec_sparse.recsys.harness.rows import Rows
from lt4rec_sparse.recsys.harness.trials import Masks, Search, Training, Trial
from lt4rec_sparse.recsys.models import build, loss_of
from lt4rec_sparse.recsys.tables import table
from lt4rec_sparse.recsys.training import Joint, TaskLosses, fastest_dtype, train
from lt4rec_sparse.stopwatch import interleaved

SEEDS = 3
BATCH, STEPS = 1024, 20  # one call of the stopwatch trains this many batches
EXPERTS, EXPERT, TOWER = 4, (256, 128), (128,)  # those of our MMoE at 512-256-128
TASKS = ("ctr", "cvr")
LOSSES = {"ctr": loss_of("binary"), "cvr": loss_of("ratio")}
TABLE = (1_000_000, 16)  # rows and width of the large embedding table


def run(data: Path) -> Path:
    """Measure both and write `results/training.json`, beside the records of other processors.

    Args:
        data: A prepared log, such as `runs/experiments/KuaiRand-Pure/data`.
    """
    found = measured(data, STEPS, rounds=9)
    records = record.read("training") if (record.RESULTS / "training.json").exists() else {}
    return record.write("training", records | {found["machine"]["processor"]: found})


def measured(data: Path, steps: int, rounds: int) -> dict[str, Any]:
    """Measure both: `steps` batches per call, `rounds` rounds of the stopwatch."""
    prepared = Prepared.load(data)
    found = _steps(prepared, steps, rounds)
    where = {"machine": record.machine(), "threads": torch.get_num_threads()}
    return {
        **where,
        "steps": found,
        "search": _search(prepared),
        "joint": _joint(prepared, SEEDS if rounds > 1 else 1),
        "embeddings": embedding_steps(TABLE, rounds),
    }


def tables_of(found: dict[str, Any]) -> str:
    """Return what was measured on one machine; older records lack the last parts."""
    of, search = found["steps"]["rows_per_second"], found["search"]
    ratios = [of[f"lt4rec_sparse, {dtype}"] / of["torch-rechub"] for dtype in ("fp32", "bf16")]
    said = (
        f"{ratios[0]:.1f}x as fast as torch-rechub as its users run it in fp32, {ratios[1]:.1f}x in bf16, which it "
        "does not offer. The search of both tasks' tickets, single-task baselines included, on the same two cores: "
        f"{search['ours_s']:.0f} s (two processes, {search.get('dtype', 'bfloat16')}, the baseline as first round), "
        f"where the plain loop takes {search['plain_s']:.0f} s (fp32, two threads, baselines apart)."
    )
    if "ours_in_blocks_s" in search:
        seconds = search["ours_in_blocks_s"]
        said += f" In blocks, by steps of kept weights alone where they are faster: {seconds:.0f} s."
    rates = [[name, f"{rate:,.0f}"] for name, rate in of.items()]
    parts = [table(["MMoE, the same rows, features, widths and batch", "rows per second"], rates), said]
    if "joint" in found:
        parts.append(_joint_table(found["joint"]))
    if "embeddings" in found:
        parts.append(_embedding_table(found["embeddings"]))
    return "\n\n".join(parts)


def _joint_table(found: list[dict[str, Any]]) -> str:
    mains = {"ctr": "auc", "cvr": "mse"}
    rows = []
    for steps in dict.fromkeys(part["steps"] for part in found):
        parts = [part for part in found if part["steps"] == steps]
        metrics = [", ".join(f"{part['validation'][t][m]:.5f}" for part in parts) for t, m in mains.items()]
        rows.append([steps, f"{median(part['train_s'] for part in parts):.1f}", *metrics])
    header = ["joint training in blocks, 20 % kept; steps", "seconds, median"]
    return table([*header, *(f"{t}: validation {m} of each seed" for t, m in mains.items())], rows)


def _embedding_table(found: dict[str, Any]) -> str:
    us = {name: timing["median_us"] for name, timing in found["timings_us"].items()}
    rows = [[name, f"{taken / 1e3:.2f}", f"{taken / us['torch.optim.SparseAdam']:.2f}"] for name, taken in us.items()]
    what = f"{found['batch']:,} rows of a table of {found['rows']:,} x {found['dim']}: lookup, gradient and step"
    return table([what, "ms", "against SparseAdam"], rows)


def _steps(prepared: Prepared, steps: int, rounds: int) -> dict[str, Any]:
    batches = list(islice(prepared.stream("train", BATCH).epoch(0), steps))
    calls: dict[str, Callable[[], object]] = {
        f"lt4rec_sparse, {name}": partial(_ours(prepared, dtype), batches)
        for name, dtype in (("fp32", None), ("bf16", torch.bfloat16))
    }
    reasons = {}
    try:
        peer = _rechub(prepared, batches)
        for train_once in peer.values():
            train_once()
    except Exception as error:  # another library's code, which may raise anything
        reasons["torch-rechub"] = f"{type(error).__name__}: {error}"
    else:
        calls |= peer
    timed = interleaved(calls, rounds=rounds, round_us=1.0)
    rows = sum(batch.batch for batch in batches)
    return {
        "rows": rows,
        "batch": BATCH,
        "absent": reasons,
        "rows_per_second": {name: rows / (t.median_us / 1e6) for name, t in timed.items()},
        "timings_us": {name: t._asdict() for name, t in timed.items()},
    }


def _ours(prepared: Prepared, dtype: torch.dtype | None) -> Callable[[list[Batch]], None]:
    encoder = prepared.encoder
    torch.manual_seed(0)
    model = build(
        "mmoe",
        encoder.fields,
        encoder.table_sizes,
        TASKS,
        (512, 256, 128),
        16,
        cross="wide_deep",
    )
    optimizer = MaskedAdam(model, 1e-3)
    stream = prepared.stream("train", BATCH)
    objective = Joint(TaskLosses(LOSSES, dtype=dtype), TASKS)
    # Taking rows from the cached log and putting them into batches is part of the time.
    return lambda batches: train(model, optimizer, stream, objective, 1, len(batches))


def _rechub(prepared: Prepared, batches: list[Batch]) -> dict[str, Callable[[], object]]:
    features = importlib.import_module("torch_rechub.basic.features")
    mmoe = importlib.import_module("torch_rechub.models.multi_task").MMOE
    trainer_of = importlib.import_module("torch_rechub.trainers").MTLTrainer
    generator = importlib.import_module("torch_rechub.utils.data").DataGenerator
    encoder = prepared.encoder
    first: dict[str, str] = {}
    fields = []
    for column, of_table, multi in encoder.fields:
        kind = features.SequenceFeature if multi else features.SparseFeature
        shared = first.setdefault(of_table, column)
        own: dict[str, Any] = {"padding_idx": 0} if multi else {}
        fields.append(
            kind(column, encoder.table_sizes[of_table], 16, shared_with=None if shared == column else shared, **own)
        )
    torch.manual_seed(0)
    model = mmoe(
        fields,
        ["classification", "regression"],
        EXPERTS,
        {"dims": list(EXPERT)},
        [{"dims": list(TOWER)}, {"dims": list(TOWER)}],
    )
    dicts = [_as_dict(prepared, batch) for batch in batches]
    x = {name: np.concatenate([part[name].numpy() for part, _ in dicts]) for name in dicts[0][0]}
    y = np.concatenate([labels.numpy() for _, labels in dicts])
    loader, *_ = generator(x, y).generate_dataloader(x, y, x, y, batch_size=BATCH)
    trainer = trainer_of(model, ["classification", "regression"], optimizer_params={"lr": 1e-3})

    def quietly(batches: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer.train_one_epoch(batches)

    return {"torch-rechub": partial(quietly, loader), "torch-rechub, batches made before": partial(quietly, dicts)}


def _as_dict(prepared: Prepared, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """Return a batch as torch-rechub reads it: one tensor per field, bags padded with 0 to 12."""
    ordered = sorted(prepared.encoder.fields, key=lambda field: field[2])
    n_single = batch.features.single.shape[1]
    x = {field[0]: batch.features.single[:, i] for i, field in enumerate(ordered[:n_single])}
    rows = batch.features.batch
    for f, field in enumerate(ordered[n_single:]):
        ends = batch.features.multi_offsets[f * rows : (f + 1) * rows + 1]
        bags = [batch.features.multi_values[a:b] for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
        # All batches have one length, because the loader stacks them.
        padded = torch.zeros(rows, 12, dtype=torch.int64)
        for row, bag in enumerate(bags):
            padded[row, : min(len(bag), 12)] = bag[:12]
        x[field[0]] = padded
    return x, torch.stack([batch.labels[task] for task in TASKS], 1)


def embedding_steps(table: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Time steps that look up `BATCH` rows of a table, drawn anew each time."""
    calls: dict[str, Callable[[], object]] = {}
    for name, is_sparse, optimizer_of in (
        ("MaskedAdam", False, MaskedAdam),
        ("MaskedAdam, sparse gradients", True, MaskedAdam),
        ("torch.optim.SparseAdam", True, lambda embedding: torch.optim.SparseAdam(embedding.parameters())),
    ):
        embedding = nn.Embedding(*table, sparse=is_sparse)
        calls[name] = partial(_embedding_step, embedding, optimizer_of(embedding), torch.Generator().manual_seed(0))
    timed = interleaved(calls, rounds=rounds, round_us=100_000.0 if rounds > 1 else 1.0)
    return {"rows": table[0], "dim": table[1], "batch": BATCH, "timings_us": {n: t._asdict() for n, t in timed.items()}}


def _embedding_step(embedding: nn.Embedding, optimizer: Any, generator: torch.Generator) -> None:
    optimizer.zero_grad()
    ids = torch.randint(embedding.num_embeddings, (BATCH,), generator=generator)
    torch.autograd.backward(embedding(ids).square().sum())
    optimizer.step()


def _search(prepared: Prepared) -> dict[str, Any]:
    """Time the search of both tasks' tickets, including baselines, and the plain loop."""
    training = Training(dtype=fastest_dtype())
    result: dict[str, Any] = {
        "dtype": training.dtype,
        "ours_s": _seconds_of_search(prepared, Rows(TASKS, training)),
        "ours_in_blocks_s": _seconds_of_search(
            prepared, Rows(TASKS, replace(training, sparse_steps=True), granularity="16x4")
        ),
    }
    started = perf_counter()
    for task in TASKS:
        plain_search(prepared, task, training, Rows(TASKS, training).search())
    return {**result, "plain_s": perf_counter() - started}


def _seconds_of_search(prepared: Prepared, rows: Rows) -> float:
    trial = Trial("sparse_sharing", TASKS, masks=Masks(search=rows.search()), training=rows.training)
    with _folder(prepared) as folder:
        wanted = {key: job for key, job in jobs_of(folder, [trial]).items() if not isinstance(key, Trial)}
        started = perf_counter()
        run_jobs(wanted)
        return perf_counter() - started


def _joint(prepared: Prepared, seeds: int) -> list[dict[str, Any]]:
    """Train sparse sharing through random blocks, of a fifth of the weights: by dense steps, and by kept weights alone.

    What is timed is a whole training: batches, embeddings, the optimiser, and the validation days' losses.
    """
    found = []
    for seed in range(seeds):
        for steps in ("dense", "kept weights alone"):
            training = Training(sparse_steps=steps != "dense")
            masks = Masks("random", Search(training, granularity="16x4", density=0.2))
            trial = Trial("sparse_sharing", TASKS, seed, training, masks, is_tested=False)
            with _folder(prepared) as folder:
                judged = Laboratory(prepared, folder).run(trial)
            metrics = {task: judged["validation"]["all"][task] for task in TASKS}
            found.append({"steps": steps, "seed": seed, "train_s": judged["seconds"]["train"], "validation": metrics})
    return found


@contextlib.contextmanager
def _folder(prepared: Prepared) -> Iterator[Path]:
    """Yield a folder in which nothing was trained on the log yet."""
    with TemporaryDirectory() as folder:
        (Path(folder) / DATA).symlink_to(prepared.folder.resolve())
        yield Path(folder)


def plain_search(prepared: Prepared, task: str, training: Training, search: Search) -> list[float]:
    """Run Algorithm 1, lines 1 to 9, for one task, in plain torch; return the validation loss of each level."""
    losses = [_plain_training(prepared, task, training, _PlainMLP, None)[0]]  # the baseline in a paper's table
    masks: list[Tensor] | None = None
    for level in range(search.rounds + 1):
        loss, model = _plain_training(prepared, task, training, _PlainMLP, masks)
        losses.append(loss)
        weights = [layer.weight.detach() for layer in model.layers]
        alive = [torch.ones_like(w) for w in weights] if masks is None else masks
        magnitudes = torch.cat([(w.abs() * mask).flatten() for w, mask in zip(weights, alive, strict=True)])
        kept = round(len(magnitudes) * search.density ** ((level + 1) / search.rounds))
        threshold = magnitudes.topk(kept).values[-1]
        masks = [((w.abs() * mask) >= threshold).float() for w, mask in zip(weights, alive, strict=True)]
    return losses


class _PlainMLP(nn.Module):
    def __init__(self, prepared: Prepared, training: Training, masks: list[Tensor] | None) -> None:
        super().__init__()
        encoder = prepared.encoder
        self.inputs = CrossedEmbeddings(encoder.fields, encoder.table_sizes, training.embedding_dim)
        widths = (self.inputs.out_features, *training.hidden)
        self.layers = nn.ModuleList(nn.Linear(k, n) for k, n in zip(widths[:-1], widths[1:], strict=True))
        self.head = nn.Linear(training.hidden[-1], 1)
        self.masks = masks

    def forward(self, features: Any) -> Tensor:
        h = self.inputs(features)
        for i, layer in enumerate(self.layers):
            weight = layer.weight if self.masks is None else layer.weight * self.masks[i]
            h = torch.relu(F.linear(h, weight, layer.bias))
        logits: Tensor = self.head(h)
        return logits.squeeze(1)


def _plain_training(
    prepared: Prepared, task: str, training: Training, make: type[_PlainMLP], masks: list[Tensor] | None
) -> tuple[float, Any]:
    torch.manual_seed(0)
    model = make(prepared, training, masks)
    optimizer = torch.optim.Adam(model.parameters(), training.learning_rate)
    for batch in _rows(prepared, "train", task, training.batch_size, shuffle=True):
        optimizer.zero_grad()
        loss = LOSSES[task](model(batch.features), batch.labels[task], batch.weights[task])
        torch.autograd.backward(loss)
        optimizer.step()
    total = count = 0.0
    with torch.no_grad():
        for batch in _rows(prepared, "validation", task, 4096, shuffle=False):
            loss = LOSSES[task](model(batch.features), batch.labels[task], batch.weights[task])
            total, count = total + float(loss) * batch.batch, count + batch.batch
    return total / count, model


def _rows(prepared: Prepared, split: str, task: str, size: int, shuffle: bool) -> Iterator[Batch]:
    for batch in prepared.stream(split, size, seed=0, shuffle=shuffle).epoch(0):
        yield batch.take(batch.rows[task].nonzero().squeeze(1))
