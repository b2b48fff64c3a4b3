"""The prepared folder: its files, the names of its columns, and how its encoder is stored.

```text
prepared.json                 fingerprint, states of the source's files, days of each split, counts
encoder.safetensors           the fitted tables; format and schema as JSON in its metadata
<split>/part-<number>.parquet one file per day, in order of days; split is train, validation or test
```

Columns of a part: `feature.<field>` (int32, or list of int32), and for every task `label.<task>` (float32),
`member.<task>` (bool: the row belongs to the task), `weight.<task>` (float32); `group` (int64); `slice.<name>` (bool);
`value.<column>` (float64, NaN where missing) for every carried column; `day` (string).
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lt4rec_sparse.files import parse_json, whole_file
from lt4rec_sparse.ranker.features import FeatureEncoder
from lt4rec_sparse.recsys.data.source import DataError

FEATURE, LABEL, MEMBER, WEIGHT, SLICE, VALUE = "feature.", "label.", "member.", "weight.", "slice.", "value."
GROUP, DAY = "group", "day"
SPLITS = ("train", "validation", "test")
PREPARED, ENCODER = "prepared.json", "encoder.safetensors"


def split_files(folder: Path, split: str) -> list[Path]:
    """Return the parts of a split, in order of days.

    Raises:
        ValueError: If there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, wanted one of {', '.join(SPLITS)}")
    return sorted((folder / split).glob("part-*.parquet"))


def save_encoder(encoder: FeatureEncoder, folder: Path) -> None:
    """Write `encoder.safetensors`."""
    arrays, meta = encoder.to_arrays()
    with whole_file(folder / ENCODER) as temporary:  # for the permissions: safetensors gives them to the owner alone
        save_file(arrays, temporary, metadata={"encoder": json.dumps(meta)})


def load_encoder(folder: Path) -> FeatureEncoder:
    """Read what `save_encoder` wrote.

    Raises:
        DataError: If the file is missing or malformed; the message begins with its path.
    """
    path = folder / ENCODER
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, the file is not a mapping
            meta = parse_json((file.metadata() or {}).get("encoder", "{}"), "encoder")
        return FeatureEncoder.from_arrays(arrays, meta)
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> DataError:
    """Return the error of a file in a prepared folder that cannot be read."""
    got = " ".join(str(error).split())
    return DataError(f"{path}: got a damaged file ({got}), wanted a part of a prepared log: prepare it again")
