"""Options that several commands share; docs/training.md describes those that say how models train."""

from __future__ import annotations

from typing import Annotated

import typer

_BASE_RATES = (
    "Start every task's scores at its mean label on the training days (its share of positives), or, as in the paper, "
    "near one half."
)
_PATIENCE = (
    "End a training after so many epochs without a gain on the validation days, with the weights of the best; 0 for "
    "all epochs."
)
_EMA = (
    "Judge and serve a moving average of the weights, of this decay per step, such as 0.999; 0 for the weights "
    "themselves."
)

_SPARSE_STEPS = (
    "Let steps through masks that stay as they are compute with kept weights alone, in fp32, where that is faster."
)
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only the result and errors.")]
TrainingPrecision = Annotated[
    str, typer.Option(help="How training multiplies matrices: fp32, bf16, or auto, the faster one on this machine.")
]
SparseGradients = Annotated[
    bool,
    typer.Option(
        "--sparse-gradients",
        help="Let a step move only the embeddings that its batch looks up: faster with large tables.",
    ),
]
SparseSteps = Annotated[bool, typer.Option("--sparse-steps/--dense-steps", help=_SPARSE_STEPS)]
BaseRates = Annotated[bool, typer.Option("--base-rates/--no-base-rates", help=_BASE_RATES)]
Patience = Annotated[int, typer.Option(help=_PATIENCE)]
PatienceOfRun = Annotated[
    int | None, typer.Option(help=f"{_PATIENCE} By default 2 where --epochs is left out and there are several.")
]
Schedule = Annotated[
    str, typer.Option(help="How learning rates fall over all epochs: constant, linear (to 0) or cosine (to 0).")
]
WarmUpSteps = Annotated[int, typer.Option(help="Training steps in which learning rates rise from 0 first.")]
WeightDecay = Annotated[
    float, typer.Option(help="Decoupled weight decay, as AdamW's, of the weights of the MLPs; 0 for none.")
]
ClipNorm = Annotated[float, typer.Option(help="Scale a step's gradients down to this global norm; 0 for never.")]
Ema = Annotated[float, typer.Option(help=_EMA)]
Tracker = Annotated[
    str,
    typer.Option(
        help="Where losses and metrics can be watched meanwhile: tensorboard or mlflow, each an extra, or none."
    ),
]
TopK = Annotated[
    int, typer.Option(help="Judge the first so many rows of each group too, by NDCG and hit rate; 0 for not.")
]
