"""The prepared folder: where its files lie, what its columns are called, and how its encoder is stored.

```text
prepared.json                 fingerprint, states of the source's files, days of each split, counts
encoder.safetensors           the fitted tables; format and schema as JSON in its metadata
<split>/part-<number>.parquet one file a day, in order of days; split is train, validation or test
```

Columns of a part: `feature.<field>` (int32, or list of int32), and for every task `label.<task>` (float32),
`member.<task>` (bool: the row belongs to the task), `weight.<task>` (float32); `group` (int64); `slice.<name>` (bool);
`value.<column>` (float64, NaN where missing) for every carried column; `day` (string).
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import save_file

from lt4rec_sparse.ranker.features import FeatureEncoder

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
    save_file(arrays, folder / ENCODER, metadata={"encoder": json.dumps(meta)})


def load_encoder(folder: Path) -> FeatureEncoder:
    """Read what `save_encoder` wrote.

    Raises:
        ValueError: If the file is malformed.
    """
    with safe_open(folder / ENCODER, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, the file is no mapping
        return FeatureEncoder.from_arrays(arrays, json.loads((file.metadata() or {}).get("encoder", "{}")))
