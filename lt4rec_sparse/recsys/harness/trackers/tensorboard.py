"""Trainings in TensorBoard: a folder of event files per training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"


class TensorBoard:
    """An entry as the folder `tensorboard/<entry>`, for `tensorboard --logdir <run folder>/tensorboard`.

    Several event files in it, one per process that went on with the training, are one run to TensorBoard. It holds no
    files: their paths are a text.
    """

    def __init__(self, folder: Path, identity: str, entry: str, step: int) -> None:
        self._path, self._step = folder / FOLDER / entry, step

    def start(self, config: Mapping[str, Any]) -> None:
        """Write the settings, as JSON, where nothing is written yet."""
        is_new = not any(self._path.glob("events.out.tfevents.*"))
        self._writer = SummaryWriter(str(self._path))
        if is_new:
            self._writer.add_text("config", f"```\n{json.dumps(config, indent=1, default=str)}\n```")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write scalars; they are on disk when this returns."""
        self._step = step
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, results: Mapping[str, float], files: Sequence[Path]) -> None:
        """Write the results as scalars of the last step, and where the files are."""
        self.log(self._step, results)
        if files:
            self._writer.add_text("files", "\n".join(f"- {path.absolute()}" for path in files))
        self._writer.close()
