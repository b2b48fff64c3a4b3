"""Options of `run` and `experiment` that say how models train."""

from __future__ import annotations

from typing import Annotated

import typer

_BASE_RATES = (
    "Start every task's scores at its mean label on the training days (its share of positives), or, as in the paper, "
    "near one half."
)
BaseRates = Annotated[bool, typer.Option("--base-rates/--no-base-rates", help=_BASE_RATES)]
