"""The command that trains a model on with later days: `lt4rec-sparse update`.

It is no option of `run`: masks, widths, tasks and vocabularies are the artefact's, so that most options of `run` would
have to be refused, and a run makes and compares many models where this makes one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lt4rec_sparse.cli_training import ClipNorm, Quiet, SparseGradients, SparseSteps, TrainingPrecision, WeightDecay


def update(
    model: Annotated[Path, typer.Argument(help="The artefact to start from: model.safetensors.")],
    data: Annotated[
        str,
        typer.Option(
            metavar="FOLDER",
            help="The folder with the log, or its URL, as `run --data` takes it: the new days, and those before.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="A folder for this update; one that was interrupted continues there.")],
    days: Annotated[
        str | None,
        typer.Option(
            help="Days to train on, such as 20220504..20220506 or DAY,DAY. By default all after the last one that the "
            "model was trained on."
        ),
    ] = None,
    validation_days: Annotated[
        str | None,
        typer.Option(
            help="Later days, on which the old and the new model are judged. By default the last of --days, which then "
            "does not train."
        ),
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of Adam, for every task.")] = 1e-3,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Impressions per training step. By default 1024, or fewer for under 150 steps."),
    ] = None,
    precision: TrainingPrecision = "auto",
    sparse_gradients: SparseGradients = False,
    sparse_steps: SparseSteps = True,
    weight_decay: WeightDecay = 0.0,
    clip_norm: ClipNorm = 0.0,
    seed: Annotated[int, typer.Option(help="Draws the embeddings of new ids.")] = 0,
    embeddings: Annotated[
        str | None,
        typer.Option(help="How the new artefact holds embeddings: fp32, fp16 or int8. By default as the old one does."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train a model on with later days of its log.

    Its masks stay, new ids get embeddings, and the new days train once, in order. The folder then holds
    model.safetensors, and report.md with the old and the new model on days that neither has seen.
    """
    from lt4rec_sparse.cli import shown_progress, training_dtype
    from lt4rec_sparse.recsys.daily import Updated, UpdateSettings
    from lt4rec_sparse.recsys.daily import update as update_model
    from lt4rec_sparse.recsys.data.remote import located
    from lt4rec_sparse.recsys.training import led

    settings = UpdateSettings(
        days=days,
        validation_days=validation_days,
        learning_rate=learning_rate,
        batch_size=batch_size,
        dtype=training_dtype(precision),
        sparse_gradients=sparse_gradients,
        sparse_steps=sparse_steps,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        seed=seed,
        embeddings=embeddings,
    )

    def carried_out() -> Updated:
        with shown_progress(quiet) as progress:
            return update_model(model, located(data), out, settings, progress)

    done = led(carried_out)
    if done is None:  # one of torchrun's other processes: the first one speaks
        return
    typer.echo(done.verdict)
    typer.echo(f"{done.model}, report.md, results.json")
