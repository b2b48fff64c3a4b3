"""Planted fields of a simulated log: input columns for which it is known to which tasks each of them matters.

Users and videos have the same number of fields of four kinds: `shared` ones matter for both tasks, `click` ones for
clicks alone, `watch` ones for watching alone, `noise` ones for neither. The score of a kind depends on that kind's
fields only: half of its variance comes from products of user and video factors, half from single values. Then

```text
click score = sqrt(shared) * (sqrt(1 - conflict) * agreed + sqrt(conflict) * bait) + sqrt(1 - shared) * clicking
watch score = sqrt(shared) * (sqrt(1 - conflict) * agreed - sqrt(conflict) * bait) + sqrt(1 - shared) * watching
```

where `agreed` and `bait` are two uncorrelated scores of the shared fields. The bait raises clicks and lowers watching:
the tasks conflict on the same fields, and their scores of the shared fields have the correlation `1 - 2 * conflict`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lt4rec_sparse.ranker.features import Column, Schema

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SIDES, KINDS = ("user", "video"), ("shared", "click", "watch", "noise")
VALUES = 16
FACTORS = 4
# The id of a video or its author, and the videos of a user's past, would replace the fields: none would be needed.
IDENTITIES = ("video_id", "author_id")


def field_kinds(per_kind: int) -> dict[str, str]:
    """Return the planted fields, `per_kind` of every side and kind, as `{"<side>_<kind>_<number>": kind}`."""
    return {f"{side}_{kind}_{number}": kind for side in SIDES for kind in KINDS for number in range(per_kind)}


def draw_fields(rng: np.random.Generator, side: str, count: int, per_kind: int) -> dict[str, Ints]:
    """Return the fields of `count` users or videos, `[count]` each, all independent and uniform."""
    return {name: rng.integers(VALUES, size=count) for name in field_kinds(per_kind) if name.startswith(f"{side}_")}


def signals(
    rng: np.random.Generator,
    users: Mapping[str, Ints],
    videos: Mapping[str, Ints],
    rows: tuple[Ints, Ints],
    shared: float,
    conflict: float,
) -> tuple[Floats, Floats]:
    """Return the click score and the watch score of every row, `[n]` each, by the formulas above.

    Users and videos have fields `[users]` and `[videos]`; `rows` are the user and the video of each row, `[n]` each.
    """
    agreed, bait, clicking, watching = (
        _score(rng, kind, users, videos, rows) for kind in ("shared", "shared", "click", "watch")
    )
    # Both depend on the same few values and would correlate by chance.
    bait = standardised(bait - (agreed * bait).mean() * agreed)
    agreed, bait = np.sqrt(shared * (1 - conflict)) * agreed, np.sqrt(shared * conflict) * bait
    alone = np.sqrt(1 - shared)
    return agreed + bait + alone * clicking, agreed - bait + alone * watching


def standardised(score: Floats) -> Floats:
    """Return `score` shifted and scaled to mean 0 and deviation 1."""
    standard: Floats = (score - score.mean()) / score.std()
    return standard


def planted_schema(schema: Schema, per_kind: int) -> Schema:
    """Return the schema of a log with planted fields: they are features; identities and histories are not."""
    kept = (column for column in schema.columns if column.name not in IDENTITIES)
    planted = (Column(name, type="int") for name in field_kinds(per_kind))
    return replace(schema, columns=(*kept, *planted), histories=())


def feature_kinds(schema: Schema, per_kind: int, shared: float) -> dict[str, str]:
    """Return the kind of every feature of a planted schema: `noise` unless the truth depends on it."""
    absent = {name for name, share in {"shared": shared, "click": 1 - shared, "watch": 1 - shared}.items() if not share}
    planted = {name: kind for name, kind in field_kinds(per_kind).items() if kind not in absent}
    return {column.name: planted.get(column.name, "noise") for column in schema.features}


def _score(
    rng: np.random.Generator,
    kind: str,
    users: Mapping[str, Ints],
    videos: Mapping[str, Ints],
    rows: tuple[Ints, Ints],
) -> Floats:
    """Return one score per row, of mean 0 and deviation 1, that depends on the fields of one kind only."""
    tables = []
    for fields in (users, videos):
        codes = [codes for name, codes in fields.items() if f"_{kind}_" in name]
        # One column per user or video: its factors and, last, its effect, summed over the fields.
        tables.append(np.sum([rng.normal(size=(FACTORS + 1, VALUES))[:, field] for field in codes], axis=0))
    (user, video), (user_rows, video_rows) = tables, rows
    products = np.zeros(len(user_rows))
    for factor in range(FACTORS):  # all at once would take the most memory of all
        products += user[factor, user_rows] * video[factor, video_rows]
    effects = user[FACTORS, user_rows] + video[FACTORS, video_rows]
    return standardised(standardised(products) + standardised(effects))
