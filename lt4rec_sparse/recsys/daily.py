"""Daily training: a served model goes on with later days of its log, through the masks that it has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

from lt4rec_sparse.errors import InputError, shown
from lt4rec_sparse.files import read_json, write_whole
from lt4rec_sparse.nn import MaskedMLP, SparseMLP, freeze
from lt4rec_sparse.ranker import Ranker, load, save
from lt4rec_sparse.ranker.features import FeatureEncoder
from lt4rec_sparse.ranker.rows import EMBEDDINGS
from lt4rec_sparse.recsys.daily_page import page, verdict
from lt4rec_sparse.recsys.data.days import Progress
from lt4rec_sparse.recsys.data.later import open_later, prepare_later
from lt4rec_sparse.recsys.data.prepare import Prepared
from lt4rec_sparse.recsys.data.remote import COPY, data_name, local_data
from lt4rec_sparse.recsys.data.source import DataError, file_digest
from lt4rec_sparse.recsys.frozen import calibrated
from lt4rec_sparse.recsys.harness import objectives
from lt4rec_sparse.recsys.harness.by_rows import by_rows
from lt4rec_sparse.recsys.harness.jobs import DATA
from lt4rec_sparse.recsys.harness.settings import CONFIG, locked
from lt4rec_sparse.recsys.harness.starts import Starts
from lt4rec_sparse.recsys.harness.trials import Training
from lt4rec_sparse.recsys.models import SparseSharing

LAYOUT = "update 1"  # of a folder; those of `run` have a number
MODEL, RESULTS, REPORT = "model.safetensors", "results.json", "report.md"


@dataclass(frozen=True)
class UpdateSettings:
    """How a model goes on with later days; what is not described here is described at `Training`.

    Attributes:
        days: The days to train on, as `DayLog.named` reads them; None for those after the last that it was trained on.
        validation_days: Days after these; None for the last of them, which then does not train.
        batch_size: None for what `by_rows` gives so many rows.
        seed: Draws the rows of new ids.
        embeddings: How the new artefact holds embeddings, "fp32", "fp16" or "int8"; None for how the old one does.
    """

    days: str | None = None
    validation_days: str | None = None
    learning_rate: float = 1e-3
    batch_size: int | None = None
    dtype: str = "float32"
    sparse_gradients: bool = False
    sparse_steps: bool = True
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    seed: int = 0
    embeddings: str | None = None

    def __post_init__(self) -> None:
        if self.embeddings not in (None, *EMBEDDINGS):
            raise InputError(f"embeddings: got {self.embeddings!r}, wanted one of {', '.join(EMBEDDINGS)}")
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"seed: got {shown(self.seed)}, wanted 0 to 2^63 - 1")
        self.training(1)  # what both have is checked there

    def training(self, rows: int) -> Training:
        """Return how a model trains on so many rows; its widths are the model's."""
        shared = ("learning_rate", "dtype", "sparse_gradients", "sparse_steps", "weight_decay", "clip_norm")
        given: dict[str, Any] = {name: getattr(self, name) for name in shared}
        batch_size = by_rows(rows).batch_size if self.batch_size is None else self.batch_size
        return Training(batch_size=batch_size, **given)


class Updated(NamedTuple):
    """What an update leaves: the path of the artefact, that of its report, and what changed, in one sentence."""

    model: Path
    report: Path
    verdict: str


def update(
    model: Path,
    data: Path | str,
    out: Path,
    settings: UpdateSettings | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Updated:
    """Train a served model on with later days of its log, once and in their order; continue an interrupted update.

    Masks stay as they are, and so does the encoder but for new ids, which are added to the vocabularies: old ids keep
    their rows. Weights start from the artefact, as they are stored; moments of Adam start at zero. Base rates are not
    set anew. The model before and after is judged on the validation days, which train neither.

    The folder `out` then holds `model.safetensors`; `report.md` and `results.json`; `config.json`, the settings;
    `data/`, the prepared days; `trained.safetensors`, the weights; `metrics.jsonl`. A finished update is not repeated.

    Args:
        model: The artefact.
        data: The folder of the log, with the days before for histories; or its URL, of which `out` gets a copy.
        out: A folder for this update alone.
        settings: How to train.
        progress: Called with a stage's name, steps done and steps in all.

    Raises:
        ArtefactError: If the artefact cannot be read.
        InputError: If the artefact cannot be trained: it lacks embeddings of a table, or ends a layer in something
            else than what `MaskedMLP` has; if `out` holds something else, or another process works there.
        DataError: If the log does not fit the model, or its days are not there (`prepare_later`).

    Source: LT4REC (arXiv 2008.09872), section 2.2: masks are found once, and the network trains incrementally each day.
    """
    started = perf_counter()
    settings = settings or UpdateSettings()
    ranker = load(model)
    _check(model, ranker)
    wanted = {"layout": LAYOUT, "model": file_digest(model), "data": data_name(data), **asdict(settings)}
    is_begun = _check_config(out, wanted)
    with locked(out):
        source = open_later(local_data(data, out / COPY, progress=progress), ranker.encoder.schema)
        prepared = prepare_later(
            source,
            out / DATA,
            ranker.encoder,
            ranker.tasks,
            settings.days,
            settings.validation_days,
            progress,
            replace=not is_begun,
        )
        _check_classes(data, prepared, ranker.tasks)
        write_whole(out / CONFIG, json.dumps(wanted, indent=1) + "\n")
        results = _earlier(out)
        if results is None:
            results = _updated(ranker, prepared, out, settings, progress) | {"model": str(model)}
            results["seconds"]["all"] = perf_counter() - started
            write_whole(out / RESULTS, json.dumps(results, indent=1) + "\n")
        write_whole(out / REPORT, page(results))
        return Updated(out / MODEL, out / REPORT, verdict(results))


def _check(path: Path, ranker: Ranker) -> None:
    try:
        MaskedMLP.from_network(ranker.mlp.network)
        ranker.inputs.tables()
    except ValueError as error:
        raise InputError(f"{path}: cannot be trained: {error}") from error


def _check_config(out: Path, wanted: Mapping[str, Any]) -> bool:
    """Return whether this update was begun in the folder; refuse one of another."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: got a file, wanted a folder for the update")
    path = out / CONFIG
    if not path.exists():
        if (out / MODEL).exists():
            raise InputError(f"{out}: got {MODEL} of something else, wanted a folder for this update alone")
        return False
    got = read_json(path)
    for key, value in wanted.items():
        if got.get(key) != value:
            raise InputError(f"{path}: got {key} = {shown(got.get(key))}, wanted {value}; choose another --out")
    return True


def _check_classes(data: Path | str, prepared: Prepared, tasks: Sequence[str]) -> None:
    """Refuse validation days on which a binary task has labels of one class: no model could be judged there."""
    found = prepared.counts["validation"]
    for task in prepared.schema.tasks:
        mean = found["tasks"][task.name]["label_mean"]
        if task.name in tasks and task.kind == "binary" and mean in (0, 1):
            got = f"only labels {mean:.0f} of {task.name} on {', '.join(found['days'])}"
            raise DataError(f"{data}: validation days: got {got}, wanted 0 and 1")


def _earlier(out: Path) -> dict[str, Any] | None:
    if not (out / RESULTS).exists() or not (out / MODEL).exists():
        return None
    return read_json(out / RESULTS, "before", "after", "grown", "seconds")


def _updated(
    ranker: Ranker, prepared: Prepared, out: Path, settings: UpdateSettings, progress: Progress
) -> dict[str, Any]:
    """Train, judge and freeze; return what the report says."""
    tasks, rows = ranker.tasks, prepared.counts["train"]["rows"]
    training = settings.training(rows)
    starts = Starts(prepared, out)
    before = trainable(ranker, prepared.encoder, None)
    judged = {"before": starts.judge(out / "before", before, "validation", tasks)["all"]}
    del before  # its embeddings are as large as those to train
    model = trainable(ranker, prepared.encoder, torch.Generator().manual_seed(settings.seed), training)
    progress("train", 0, 1)
    path = starts.made("trained.safetensors")
    objective = objectives.plain(training, tasks, starts.kinds)
    seconds = starts.once(path, model, objective, training, None)
    judged["after"] = starts.judge(path, model, "validation", tasks)["all"]
    progress("train", 1, 1)
    _save(ranker, model, prepared, out / MODEL, settings.embeddings)
    network = ranker.mlp.network
    return {
        "tasks": {task: starts.kinds[task] for task in tasks},
        **judged,
        "days": {split: prepared.counts[split]["days"] for split in ("train", "validation")},
        "rows": {split: prepared.counts[split]["rows"] for split in ("train", "validation")},
        "until": ranker.encoder.until,
        "grown": {
            name: {"before": ranker.inputs.table_sizes[name], "after": size}
            for name, size in prepared.encoder.table_sizes.items()
        },
        "started_from": {"embeddings": ranker.inputs.kind, "network": str(network.dtype).removeprefix("torch.")},
        "batch_size": training.batch_size,
        "steps": starts.batches(training),
        "seconds": {"train": seconds},
    }


def trainable(
    ranker: Ranker, encoder: FeatureEncoder, generator: torch.Generator | None, training: Training | None = None
) -> SparseSharing:
    """Return a ranker's model, as it is stored, with rows for the encoder's new ids; see `CrossedEmbeddings.grown`."""
    is_sparse = training is not None and training.sparse_gradients
    inputs = ranker.inputs.grown(encoder.table_sizes, generator, is_sparse)
    mlp = MaskedMLP.from_network(ranker.mlp.network)
    model = SparseSharing(inputs, ranker.tasks, [layer.out_features for layer in mlp.masked_layers()])
    model.mlp = mlp
    return model


def _save(ranker: Ranker, model: SparseSharing, prepared: Prepared, path: Path, embeddings: str | None) -> None:
    """Freeze the model as the old artefact was: calibrated if it was, weights in its dtype, embeddings in its kind."""
    network = ranker.mlp.network
    frozen = freeze(model.mlp, sigmoid=True) if network.quantization is None else calibrated(model, prepared)
    assert isinstance(frozen, SparseMLP)
    mlp = SparseMLP(frozen.network if network.dtype == torch.float32 else frozen.network.to(network.dtype))
    save(Ranker(prepared.encoder, model.inputs, mlp), path, embeddings or ranker.inputs.kind)
