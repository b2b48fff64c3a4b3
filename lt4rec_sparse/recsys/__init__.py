"""Ranking from a click log: data, models, training, and the product's run from log to frozen ranker.

`fit` trains a ranker on a table, `update` trains one on with later days. They are imported when they are first asked
for: workers that train need less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lt4rec_sparse.recsys.daily import Updated, UpdateSettings, update
    from lt4rec_sparse.recsys.fitting import Fitted, fit

__all__ = ["Fitted", "UpdateSettings", "Updated", "fit", "update"]
_OF_FITTING = ("Fitted", "fit")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lt4rec_sparse.recsys import daily, fitting

    return getattr(fitting if name in _OF_FITTING else daily, name)
