"""What `python -m bench serving` puts behind the server's routes: rankers whose MLP another engine computes, dense.

Encoding and embeddings are ours in all of them, so that only the MLP differs. `lt4rec_sparse.serve` calls one of the
loaders by name, with the artefact's path and a precision, which an opponent ignores.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lt4rec_sparse import Ranker, load, to_onnx
from lt4rec_sparse.ranker.ranking import Ranking, checked_k, rank_scores, ranking
from lt4rec_sparse.serve import examples

CALIBRATION = (16, 256)  # requests, and candidates of each


class Opponent(Ranker):
    """A ranker with another MLP.

    Args:
        ranker: Ours.
        scores: `x [batch, in_features]` to `[batch, tasks]`, on one thread.
    """

    def __init__(self, ranker: Ranker, scores: Callable[[Tensor], NDArray[np.float32]]) -> None:
        super().__init__(ranker.encoder, ranker.inputs, ranker.mlp)
        self._scores = scores

    def score(self, batch: Mapping[str, Any], embeddings: Any = None) -> dict[str, NDArray[np.float32]]:
        """Score as `Ranker.score` does."""
        scores = self._scores(crossed(self, batch))
        return {task: scores[:, i] for i, task in enumerate(self.tasks)}

    def rank(
        self, candidates: Any, context: Any = None, k: Any = None, *, by: Any = None, embeddings: Any = None
    ) -> Any:
        """Rank by the product of all tasks, as `Ranker.rank` does."""
        assert by is None
        scores = self.score({**candidates, **(context or {})})
        found: Ranking = ranking(scores, rank_scores(scores, dict.fromkeys(self.tasks, 1.0)), checked_k(k))
        return found


@torch.inference_mode()
def crossed(ranker: Ranker, batch: Mapping[str, Any]) -> Tensor:
    """Return what enters the MLP."""
    x: Tensor = ranker.inputs(ranker.encoder.encode(batch))
    return x


def dense_torch(path: str, precision: str) -> Ranker:
    """Load a ranker whose MLP is torch's, dense, in float32."""
    ranker = load(path)
    mlp = ranker.mlp.to_dense().float().eval()

    @torch.inference_mode()
    def scores(x: Tensor) -> NDArray[np.float32]:
        computed: NDArray[np.float32] = mlp(x).numpy()
        return computed

    return Opponent(ranker, scores)


def dense_onnx_int8(path: str, precision: str) -> Ranker:
    """Load a ranker whose MLP is ONNX Runtime's, dense, in int8: calibrated, per channel."""
    import onnxruntime as ort
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quant_pre_process,
        quantize_static,
    )

    ranker = load(path)

    class Rows(CalibrationDataReader):  # type: ignore[misc]
        """What enters the MLP of made requests, one request at a time."""

        def __init__(self) -> None:
            self.rows: Iterator[dict[str, Any]] = iter(
                [
                    {"x": crossed(ranker, columns(request)).numpy()}
                    for request in examples.made(ranker.encoder, *CALIBRATION)
                ]
            )

        def get_next(self) -> Any:
            """Return the next batch."""
            return next(self.rows, None)

    with tempfile.TemporaryDirectory() as folder:
        written, prepared, quantized = (str(Path(folder) / f"{name}.onnx") for name in ("mlp", "prepared", "int8"))
        to_onnx(ranker.mlp, written)
        quant_pre_process(written, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            quantized,
            Rows(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])
    tasks = list(ranker.tasks)

    def scores(x: Tensor) -> NDArray[np.float32]:
        return np.concatenate(session.run(tasks, {"x": x.numpy()}), axis=1)

    return Opponent(ranker, scores)


def columns(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return a made request as `Ranker.score` takes it."""
    rows = request["candidates"]
    candidates = {name: [row[name] for row in rows] for name in rows[0]}
    return candidates | {name: [value] for name, value in request["context"].items()}
