"""The served model: raw feature values in, every task's probability out, through compressed weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lt4rec_sparse.features import EncodedFeatures, FeatureEncoder
from lt4rec_sparse.nn import CrossedEmbeddings, SparseMLP


class Ranker:
    """Scores candidates for every task in one call.

    Args:
        encoder: Raw values to ids, as fitted in training.
        inputs: Ids to the MLP's input, as trained.
        mlp: The frozen MLP, its heads ending in a sigmoid.

    Raises:
        ValueError: If the widths of `inputs` and `mlp` differ, or a head does not end in a sigmoid.
    """

    def __init__(self, encoder: FeatureEncoder, inputs: CrossedEmbeddings, mlp: SparseMLP) -> None:
        if inputs.out_features != mlp.in_features:
            raise ValueError(
                f"mlp: got in_features {mlp.in_features}, wanted {inputs.out_features}, those of the inputs"
            )
        for task, head in mlp.heads.items():
            if head.activation != "sigmoid":
                raise ValueError(
                    f"head of {task}: got activation {head.activation}, wanted sigmoid: freeze(sigmoid=True)"
                )
        self.encoder = encoder
        self.inputs = inputs.eval().requires_grad_(False)
        self.mlp = mlp
        self.tasks = mlp.tasks

    @property
    def precision(self) -> str:
        """How the MLP computes: "fp32", "bf16" or "int8"."""
        return self.mlp.precision

    def to_precision(self, precision: str) -> Ranker:
        """Return the same ranker with its MLP in another precision; both share encoder, embeddings and weights.

        Raises:
            ValueError: If there is no such precision, or "int8" is asked of a ranker that is not calibrated.
        """
        return Ranker(self.encoder, self.inputs, self.mlp.to_precision(precision))

    def score(self, batch: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
        """Score a batch of candidates from raw values.

        Args:
            batch: Column name -> one value a candidate (list or array; None or NaN is missing; a multi-valued column
                holds a list of values, or one separated string, a candidate). Columns that are no feature are ignored.

        Returns:
            Task name -> probability (or expected ratio) of each candidate, float32 `[batch]`.

        Raises:
            ValueError: If a feature column is missing or has another length than the others.
        """
        scores = self.score_encoded(self.encoder.encode(batch)).numpy()
        return {task: scores[:, i] for i, task in enumerate(self.tasks)}

    @torch.inference_mode()
    def score_encoded(self, features: EncodedFeatures) -> Tensor:
        """Score encoded candidates: `[batch, tasks]`, float32."""
        x: Tensor = self.inputs(features)
        scores = x.new_empty(len(x), self.mlp.out_features)
        self.mlp.score_into(x, scores)
        return scores
