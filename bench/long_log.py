"""A log of KuaiRand-27K's shape and any length: its files, columns and proportions, and no signal to learn.

The whole set has 322 million rows of 27,285 users and 32 million videos on 31 days: ten rows per video, so that most
ids are rare. Rows of a file come in the order of time, as in the original.
"""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

USERS, DAYS, ROWS_PER_VIDEO = 27_285, 31, 10
FIRST_DAY = date(2022, 4, 8)
DAY_MS = 86_400_000
FIRST_MS = 1_649_347_200_000  # the first day's midnight in China
DUPLICATES = 0.01
# A share of the videos is seen ten times as often as this exponent's tail: half of all ids come up once or twice.
SKEW = 2.5
LEVELS = ("full_active", "high_active", "middle_active", "low_active", "UNKNOWN")
RANGES = ("0", "(0,10]", "(10,50]", "(50,100]", "(100,150]", "(150,250]", "(250,500]", "500+")
UPLOADS = ("LongImport", "ShortImport", "LongCamera", "ShortCamera", "Kmovie", "PictureSet", "Web")

Rng = np.random.Generator


def write_log(folder: Path, rows: int, seed: int = 0) -> None:
    """Write `rows` rows on 31 days in CSV, and the side tables of users and videos."""
    rng = np.random.default_rng(seed)
    videos = max(1000, rows // ROWS_PER_VIDEO)
    folder.mkdir(parents=True)
    _write(folder / "user_features_27k.csv", _users(rng))
    _write(folder / "video_features_basic_27k.csv", _videos(rng, videos))
    for day in range(DAYS):
        of_day = rows * (day + 1) // DAYS - rows * day // DAYS
        _write(folder / f"log_standard_{day:02}_27k.csv", _impressions(rng, day, of_day, videos))


def _write(path: Path, columns: dict[str, Any]) -> None:
    pyarrow.csv.write_csv(pa.table(columns), path)


def _texts(rng: Rng, texts: tuple[str, ...], rows: int) -> Any:
    return pa.DictionaryArray.from_arrays(
        rng.integers(len(texts), size=rows, dtype=np.int32), texts
    ).dictionary_decode()


def _users(rng: Rng) -> dict[str, Any]:
    ranges = ("follow_user_num_range", "fans_user_num_range", "friend_user_num_range", "register_days_range")
    return {
        "user_id": np.arange(USERS),
        "user_active_degree": _texts(rng, LEVELS, USERS),
        "is_video_author": rng.integers(2, size=USERS),
        **{name: _texts(rng, RANGES, USERS) for name in ranges},
        **{f"onehot_feat{place}": rng.integers(2 + 40 * (place % 5), size=USERS) for place in range(18)},
    }


def _videos(rng: Rng, videos: int) -> dict[str, Any]:
    dates = tuple((FIRST_DAY + timedelta(days=day)).isoformat() for day in range(-60, DAYS))
    return {
        "video_id": np.arange(videos),
        "author_id": rng.integers(max(1, videos // 4), size=videos),
        "video_type": _texts(rng, ("NORMAL", "AD"), videos),
        "upload_dt": _texts(rng, dates, videos),
        "upload_type": _texts(rng, UPLOADS, videos),
        "server_width": rng.choice((540.0, 720.0, 1080.0), videos),
        "music_id": rng.integers(max(1, videos // 2), size=videos),
        "tag": rng.integers(68, size=videos),
    }


def _impressions(rng: Rng, day: int, rows: int, videos: int) -> dict[str, NDArray[Any]]:
    moments = np.sort(rng.integers(DAY_MS, size=rows))
    length = np.clip(rng.lognormal(10.3, 0.8, rows), 3_000, 600_000).astype(np.int64)
    clicked = rng.random(rows) < 0.38
    played = (length * np.where(clicked, rng.random(rows), 0.05 * rng.random(rows))).astype(np.int64)
    columns = {
        "user_id": rng.integers(USERS, size=rows),
        "video_id": (videos * rng.random(rows) ** SKEW).astype(np.int64),
        "date": np.full(rows, int((FIRST_DAY + timedelta(days=day)).strftime("%Y%m%d"))),
        "hourmin": moments // 3_600_000 * 100,
        "time_ms": FIRST_MS + day * DAY_MS + moments,
        "is_click": clicked.astype(np.int8),
        "is_like": (rng.random(rows) < 0.016).astype(np.int8),
        **{name: (rng.random(rows) < 0.002).astype(np.int8) for name in ("is_follow", "is_comment", "is_forward")},
        "is_hate": np.zeros(rows, np.int8),
        "long_view": (clicked & (played > length * 0.6)).astype(np.int8),
        "play_time_ms": played,
        "duration_ms": length,
        "profile_stay_time": np.zeros(rows, np.int8),
        "comment_stay_time": rng.integers(2, size=rows) * rng.integers(20_000, size=rows),
        "is_profile_enter": np.zeros(rows, np.int8),
        "is_rand": np.zeros(rows, np.int8),
        "tab": rng.choice((0, 1, 2, 4, 6), rows, p=(0.1, 0.7, 0.05, 0.1, 0.05)),
    }
    # Some rows come twice in a row, as in the original.
    repeated = np.arange(rows) - (rng.random(rows) < DUPLICATES)
    return {name: column[np.maximum(repeated, 0)] for name, column in columns.items()}
