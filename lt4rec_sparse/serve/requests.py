"""What a request asks for, however it is spelled, and the ranker's answer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lt4rec_sparse.ranker import Ranker
from lt4rec_sparse.ranker.ranking import Ranking
from lt4rec_sparse.serve.settings import Limits, RequestError


@dataclass(frozen=True)
class Request:
    """One ranking to make: the arguments of `Ranker.rank`, and `rows`, how many candidates there are."""

    candidates: dict[str, Any]
    context: dict[str, Any]
    rows: int
    k: int | None
    by: dict[str, float] | None


def split(columns: Mapping[str, Any], rows: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the columns that differ between candidates, and those of one row beside them, which hold for all."""
    if all(got == 1 for got in rows.values()):
        return dict(columns), {}
    candidates = {name: values for name, values in columns.items() if rows[name] != 1}
    return candidates, {name: values for name, values in columns.items() if rows[name] == 1}


def check_exponents(by: Collection[str], limits: Limits) -> None:
    """Refuse more exponents than a request may name: a column of one row costs each as much as all candidates."""
    if len(by) > limits.exponents:
        raise RequestError(f"by: got {len(by)} exponents, wanted at most {limits.exponents}")


def rank(ranker: Ranker, request: Request) -> Ranking:
    """Rank the candidates of a request.

    Raises:
        InputError: As `Ranker.rank` does.
    """
    return ranker.rank(request.candidates, request.context, request.k, by=request.by)
