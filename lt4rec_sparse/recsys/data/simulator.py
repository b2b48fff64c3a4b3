"""A click log with a known truth: the same files as a real log, and the best scores that any model can reach on it.

Users and videos have features; every feature value has hidden factors. Three scores come from products of user and
video factors and from the context: one shared by both tasks, one of the clicks alone, one of the watching alone.

```text
click ~ Bernoulli(sigmoid(bias  + strength * (sqrt(shared) * common + sqrt(1 - shared) * clicking)))
watch ~ Beta with mean sigmoid(... strength * (sqrt(shared) * common + sqrt(1 - shared) * watching))
watching = -conflict * clicking + sqrt(1 - conflict^2) * own
```

Thus `shared` sets how much the tasks have in common, and `conflict` how much the rest opposes them. As in real logs
there are missing values, exact duplicates, durations of zero and, on late days, videos that no training day contains.

With `planted_fields` the scores come from other columns, whose tasks are listed in `truth.json` (`data/planted.py`).
With a `request_size` that many videos are shown to one user at one moment, and the log has the outcome of each: any
other order of the rows of a `request_id` can be evaluated. (Here the outcome of a row does not depend on the others of
its request, unlike in real logs.) Apart from a short glance at videos that are not clicked, the expected play time of
a row is `truth_click * truth_watch * duration_ms`.

The proportions of the paper's log, 297M impressions to 121M clicks to 49M conversions, are `click_rate=0.41` and
`watch_rate=0.4`, with `long_view` as the conversion: more than 0.6 of the video was watched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.files import read_json
from lt4rec_sparse.ranker.features import Schema
from lt4rec_sparse.recsys.data.planted import draw_fields, feature_kinds, planted_schema, signals, standardised
from lt4rec_sparse.recsys.data.source import SCHEMA_FILE, TRUTH, DataError, prepared_folder
from lt4rec_sparse.recsys.metrics import AUC

FIRST_DAY = date(2024, 1, 1)
FACTORS = 6
SEGMENTS, AGES, CATEGORIES, TAGS, TABS, HOURS = 16, 6, 20, 40, 5, 24
VIDEOS_PER_AUTHOR = 4
MOST_TAGS = 4
# With these two the best AUC is about 0.78, as on real logs, and the best MSE about half of a constant's.
STRENGTH = 1.25
WATCH_CONCENTRATION = 5.0
WATCH_BIAS = 0.3
LONG_VIEW = 0.6
# A video that is not clicked is played for at most this share: a glance at its start.
GLANCE = 0.05
# Midpoints of an integral, and bins for all values of a logit or a mean: both are exact to four digits.
POINTS, BINS = 400, 1000
NEW_VIDEOS, MISSING, DUPLICATES, ZERO_DURATIONS = 0.15, 0.02, 0.02, 0.015
MS_PER_HOUR = 3_600_000

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Columns = dict[str, Any]
Rng = np.random.Generator


@dataclass(frozen=True)
class SimulatorConfig:
    """Size and difficulty of a simulated log; the same seed gives the same files."""

    users: int = 4_000
    videos: int = 1_500  # some of them appear only on later days
    impressions: int = 80_000  # rows before duplicates
    days: int = 12  # at least 5: the last two are for testing, the two before for validation
    click_rate: float = 0.35  # share of impressions that are clicked
    shared: float = 0.5  # share of each task's signal that both have in common, in [0, 1]
    # How strongly the rest of the two signals is opposed, in [0, 1]; with planted fields, the share of their common
    # signal in which they are opposed.
    conflict: float = 0.5
    seed: int = 0
    watch_rate: float | None = None  # share of the clicks that are viewed long; None sets the bias to 0.3
    planted_fields: int = 0  # of each kind (shared, click, watch, noise), for users and for videos
    request_size: int = 1  # impressions per request, all of different videos; with 1 there is no `request_id`

    def __post_init__(self) -> None:
        least = {"users": 1, "videos": 10, "impressions": 100, "days": 5, "request_size": 1}
        for name, wanted in {**least, "seed": 0, "planted_fields": 0}.items():
            if getattr(self, name) < wanted:
                raise InputError(f"{name}: got {getattr(self, name)}, wanted at least {wanted}")
        for name in ("shared", "conflict"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: got {getattr(self, name)}, wanted a number in [0, 1]")
        for name in ("click_rate", "watch_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < 1:
                raise InputError(f"{name}: got {rate}, wanted a number in (0, 1)")
        if self.impressions % self.request_size:
            got = f"impressions: got {self.impressions}"
            raise InputError(f"{got}, wanted a multiple of request_size, {self.request_size}")


def simulate(config: SimulatorConfig, folder: Path) -> dict[str, Any]:
    """Write a simulated log, its side tables, `schema.toml` and `truth.json`, and return the latter's content.

    `truth.json` holds the scores of the true probabilities on the test days (`ctr_auc`, `cvr_mse`), which a model can
    beat only by luck, the same for the best `constant`, the kind of every feature if fields are planted (`fields`,
    else empty), and the `config`. A folder that was written with the same config is kept.

    Raises:
        DataError: If the folder holds something else.
        InputError: If a day has fewer videos than a request needs.
    """
    wanted = "wanted a new, an empty or an earlier folder"  # another file of that name must not be replaced
    if (folder / TRUTH).is_file():
        try:
            truth = read_json(folder / TRUTH)
        except InputError as error:
            raise DataError(f"{error}; {wanted}") from error
        if "config" not in truth:
            raise DataError(f"{folder / TRUTH}: got no truth of a simulated log, {wanted}")
        if truth["config"] == asdict(config):
            return truth
    rng = np.random.default_rng(config.seed)
    users, videos = _users(rng, config), _videos(rng, config)
    # A separate stream, so that logs without planted fields do not depend on this code.
    planting = np.random.default_rng([config.seed, 1])
    users["planted"] = draw_fields(planting, "user", config.users, config.planted_fields)
    videos["planted"] = draw_fields(planting, "video", config.videos, config.planted_fields)
    log = _impressions(rng, config, videos)
    _outcomes(rng, planting, config, users, videos, log)
    with prepared_folder(folder, TRUTH) as fresh:
        schema = _write_schema(config, fresh / SCHEMA_FILE)
        best = _best_scores(log, log["day"] >= config.days - schema.split.test_days)
        fields = feature_kinds(schema, config.planted_fields, config.shared) if config.planted_fields else {}
        truth = {"config": asdict(config), **best, "fields": fields}
        _write(rng, config, fresh, users, videos, log)
        (fresh / TRUTH).write_text(json.dumps(truth, indent=1), encoding="utf-8")
    return truth


def _write_schema(config: SimulatorConfig, path: Path) -> Schema:
    path.write_text(files("lt4rec_sparse.recsys.data").joinpath("simulator.toml").read_text(encoding="utf-8"), "utf-8")
    plain = schema = Schema.from_toml(path)
    if config.request_size > 1:
        schema = replace(schema, carried=(*schema.carried, "request_id"))
    if config.planted_fields:
        schema = planted_schema(schema, config.planted_fields)
    if schema != plain:
        path.write_text(schema.to_toml(), "utf-8")
    return schema


def _users(rng: Rng, config: SimulatorConfig) -> Columns:
    return {
        "segment": rng.integers(SEGMENTS, size=config.users),
        # -1 is missing: it has no factors, so that the truth does not depend on it either.
        "age": np.where(rng.random(config.users) < MISSING, -1, rng.integers(AGES, size=config.users)),
        "activity": rng.lognormal(size=config.users),
    }


def _videos(rng: Rng, config: SimulatorConfig) -> Columns:
    count = config.videos
    upload_day = np.where(
        rng.random(count) < NEW_VIDEOS, rng.integers(1, config.days, count), rng.integers(-30, 1, count)
    )
    has_tag = np.zeros((count, TAGS), np.bool_)
    drawn = rng.integers(TAGS, size=(count, MOST_TAGS))
    used = np.arange(MOST_TAGS) < rng.integers(MOST_TAGS + 1, size=(count, 1))
    has_tag[np.nonzero(used)[0], drawn[used]] = True
    return {
        "author": rng.integers(max(1, count // VIDEOS_PER_AUTHOR), size=count),
        "category": np.where(rng.random(count) < MISSING, -1, rng.integers(CATEGORIES, size=count)),
        "has_tag": has_tag,
        "duration_ms": np.clip(rng.lognormal(10.3, 0.8, count), 3_000, 600_000).astype(np.int64),
        "upload_day": upload_day,
    }


def _impressions(rng: Rng, config: SimulatorConfig, videos: Columns) -> Columns:
    """Draw who sees which video when: active users, popular videos that are already uploaded, mostly in the evening."""
    requests = config.impressions // config.request_size
    day = np.sort(rng.integers(config.days, size=requests))
    popularity = 1 / (rng.permutation(config.videos) + 10) ** 0.8
    video = np.empty((requests, config.request_size), np.int64)
    for today in range(config.days):
        there = popularity * (videos["upload_day"] <= today)
        rows = day == today
        video[rows] = _candidates(rng, there, (int(rows.sum()), config.request_size))
    activity = rng.lognormal(size=config.users)
    by_hour = 1 + np.sin(np.arange(HOURS) / HOURS * np.pi) ** 2
    hour = rng.choice(HOURS, requests, p=by_hour / by_hour.sum())
    log = {
        "day": day,
        "user": rng.choice(config.users, requests, p=activity / activity.sum()),
        "video": video,
        "hour": hour,
        "tab": rng.choice(TABS, requests, p=np.arange(TABS, 0, -1) / np.arange(TABS + 1).sum()),
        "time_ms": (day * HOURS + hour) * MS_PER_HOUR + rng.integers(MS_PER_HOUR, size=requests),
    }
    order = np.argsort(log["time_ms"], kind="stable")
    log = {name: column[order] for name, column in log.items()}
    if config.request_size > 1:
        log["request_id"] = np.arange(requests)
    return {
        name: column.reshape(-1) if name == "video" else np.repeat(column, config.request_size)
        for name, column in log.items()
    }


def _candidates(rng: Rng, weights: Floats, shape: tuple[int, int]) -> Ints:
    """Return videos `[requests, size]`, drawn by their weights `[videos]`, all different within a request."""
    requests, size = shape
    there = int(np.count_nonzero(weights))
    if there < size:
        raise InputError(f"videos: got a day with {there}, wanted at least the {size} of a request")
    probabilities = weights / weights.sum()
    drawn = rng.choice(len(weights), shape, p=probabilities)
    open_rows = np.arange(requests)
    while len(open_rows):
        order = np.argsort(drawn[open_rows], axis=1, kind="stable")
        ordered = np.take_along_axis(drawn[open_rows], order, axis=1)
        row, place = np.nonzero(ordered[:, 1:] == ordered[:, :-1])
        drawn[open_rows[row], order[row, place + 1]] = rng.choice(len(weights), len(row), p=probabilities)
        open_rows = np.unique(open_rows[row])
    return drawn


def _outcomes(rng: Rng, planting: Rng, config: SimulatorConfig, users: Columns, videos: Columns, log: Columns) -> None:
    """Add the true probabilities and the outcomes drawn from them."""
    if config.planted_fields:
        rows, shares = (log["user"], log["video"]), (config.shared, config.conflict)
        to_click, to_watch = signals(planting, users["planted"], videos["planted"], rows, *shares)
    else:
        common, clicking, own = (_score(rng, users, videos, log) for _ in range(3))
        watching = -config.conflict * clicking + np.sqrt(1 - config.conflict**2) * own
        both, alone = np.sqrt(config.shared), np.sqrt(1 - config.shared)
        to_click, to_watch = both * common + alone * clicking, both * common + alone * watching
    click_logit, watch_logit = STRENGTH * to_click, STRENGTH * to_watch
    log["truth_click"] = _sigmoid(click_logit + _bias(click_logit, config.click_rate))
    log["truth_watch"] = _sigmoid(_watch_bias(watch_logit, log["truth_click"], config.watch_rate) + watch_logit)
    clicked = rng.random(len(click_logit)) < log["truth_click"]
    mean = log["truth_watch"]
    watched = rng.beta(WATCH_CONCENTRATION * mean, WATCH_CONCENTRATION * (1 - mean))
    ratio = np.where(clicked, watched, GLANCE * rng.random(len(mean)))
    duration = videos["duration_ms"][log["video"]]
    log["is_click"] = clicked.astype(np.int64)
    log["long_view"] = (clicked & (ratio > LONG_VIEW)).astype(np.int64)
    log["play_time_ms"] = (ratio * duration).astype(np.int64)
    log["duration_ms"] = np.where(rng.random(len(mean)) < ZERO_DURATIONS, 0, duration)


def _score(rng: Rng, users: Columns, videos: Columns, log: Columns) -> Floats:
    """Return one score per row, of mean 0 and deviation 1: products of hidden factors, and effects of the context."""
    user = _factors(rng, SEGMENTS)[users["segment"]] + _factors(rng, AGES)[users["age"]]
    tags = videos["has_tag"] / np.maximum(videos["has_tag"].sum(1, keepdims=True), 1)
    video = _factors(rng, CATEGORIES)[videos["category"]] + tags @ _factors(rng, TAGS)[:-1]
    products = (user[log["user"]] * video[log["video"]]).sum(1) / np.sqrt(FACTORS)
    author = rng.normal(scale=0.5, size=videos["author"].max() + 1)[videos["author"]]
    context = rng.normal(scale=0.5, size=HOURS)[log["hour"]] + rng.normal(scale=0.5, size=TABS)[log["tab"]]
    length = 0.5 * rng.normal() * (np.log(videos["duration_ms"]) - 10.3)
    return standardised(products + context + (author + length)[log["video"]])


def _factors(rng: Rng, count: int) -> Floats:
    """Return a row of factors per value, and a last row of zeros: index -1, a missing value."""
    return np.concatenate([rng.normal(size=(count, FACTORS)), np.zeros((1, FACTORS))])


def _bias(logits: Floats, rate: float) -> float:
    """Return the bias at which the mean probability is `rate`."""
    return _rising_root(lambda bias: float(_sigmoid(logits + bias).mean()), rate)


def _watch_bias(logits: Floats, click: Floats, rate: float | None) -> float:
    """Return the bias at which the share of the clicks, of probability `click`, that are viewed long is `rate`."""
    if rate is None:
        return WATCH_BIAS
    means = np.linspace(0, 1, BINS + 1)
    shares = long_view_share(means)
    # A histogram of clicks by logit: otherwise each step of the search would go through millions of rows.
    clicks, edges = np.histogram(logits, BINS, weights=click / click.sum())
    middles = (edges[:-1] + edges[1:]) / 2
    return _rising_root(lambda bias: float(clicks @ np.interp(_sigmoid(middles + bias), means, shares)), rate)


def _rising_root(function: Callable[[float], float], wanted: float) -> float:
    """Return where a rising function has the wanted value, by bisection."""
    low, high = -30.0, 30.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < wanted else (low, middle)
    return low


def long_view_share(means: Floats) -> Floats:
    """Return the probability that the watch ratio of a click is above `LONG_VIEW`, `[n]` for expected ratios `[n]`.

    The ratio is Beta(a, b) with `a = WATCH_CONCENTRATION * mean` and `b = WATCH_CONCENTRATION - a`. Its density
    `x^(a-1) (1-x)^(b-1) / B(a, b)` may be infinite at 1; with `u = (1-x)^b` that factor vanishes, and the rest,
    `(1 - u^(1/b))^(a-1)` between 0 and `(1-LONG_VIEW)^b`, is summed at midpoints.
    """
    shares: Floats = (means == 1).astype(np.float64)
    inside = (means > 0) & (means < 1)
    a = WATCH_CONCENTRATION * means[inside, None]
    b = WATCH_CONCENTRATION - a
    end = (1 - LONG_VIEW) ** b
    u = end * (np.arange(POINTS) + 0.5) / POINTS
    integral = end[:, 0] * ((1 - u ** (1 / b)) ** (a - 1)).mean(1) / b[:, 0]
    log_gamma = np.vectorize(math.lgamma, otypes=[np.float64])
    shares[inside] = integral * np.exp(math.lgamma(WATCH_CONCENTRATION) - log_gamma(a[:, 0]) - log_gamma(b[:, 0]))
    return shares


def _sigmoid(logits: Floats) -> Floats:
    probabilities: Floats = 1 / (1 + np.exp(-logits))
    return probabilities


def _best_scores(log: Columns, test: NDArray[np.bool_]) -> Columns:
    probability, clicked = log["truth_click"][test], log["is_click"][test]
    auc = AUC()
    auc.update(np.log(probability / (1 - probability)), clicked.astype(np.float64), log["user"][test])
    watched = test & (log["is_click"] > 0) & (log["duration_ms"] > 0)
    ratio = log["play_time_ms"][watched] / log["duration_ms"][watched]
    best = float(((log["truth_watch"][watched] - ratio) ** 2).mean())
    constant = {"ctr_auc": 0.5, "cvr_mse": float(ratio.var())}
    return {"ctr_auc": auc.compute(), "cvr_mse": best, "constant": constant}


def _write(rng: Rng, config: SimulatorConfig, folder: Path, users: Columns, videos: Columns, log: Columns) -> None:
    of_users = {
        "user_id": np.arange(config.users),
        "segment": _names("segment", users["segment"]),
        "age_range": _names("age", users["age"]),
        "activity": pa.array(users["activity"], mask=rng.random(config.users) < MISSING),
    }
    pq.write_table(pa.table(of_users | users["planted"]), folder / "users.parquet")
    dates = [(FIRST_DAY + timedelta(days=day)).isoformat() for day in range(-30, config.days)]
    of_videos = {
        "video_id": np.arange(config.videos),
        "author_id": videos["author"],
        "category": _names("category", videos["category"]),
        "tags": [[f"tag {tag}" for tag in np.flatnonzero(row)] for row in videos["has_tag"]],
        "upload_date": [dates[day + 30] for day in videos["upload_day"]],
    }
    pq.write_table(pa.table(of_videos | videos["planted"]), folder / "videos.parquet")
    (folder / "log").mkdir()
    # Some rows come twice, next to each other, as if a client sent an event again.
    repeats = 1 + (rng.random(config.impressions) < DUPLICATES)
    start_ms = (FIRST_DAY - date(1970, 1, 1)).days * HOURS * MS_PER_HOUR
    renamed = {"user": "user_id", "video": "video_id"}
    for day in range(config.days):
        rows = np.repeat(np.arange(config.impressions), repeats * (log["day"] == day))
        columns = {renamed.get(name, name): column[rows] for name, column in log.items() if name != "day"}
        columns |= {"date": [dates[day + 30]] * len(rows), "time_ms": start_ms + columns["time_ms"]}
        pq.write_table(pa.table(columns), folder / "log" / f"{dates[day + 30]}.parquet")


def _names(kind: str, codes: Ints) -> Any:
    return pa.array([f"{kind} {code}" if code >= 0 else None for code in codes.tolist()], pa.string())
