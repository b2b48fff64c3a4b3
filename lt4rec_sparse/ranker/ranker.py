"""The served model: from raw feature values to every task's probability, through compressed weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lt4rec_sparse import ops
from lt4rec_sparse.errors import InputError, shown
from lt4rec_sparse.network import FrozenNetwork
from lt4rec_sparse.nn import Plan, SparseMLP
from lt4rec_sparse.ranker.engine_file import write_engine_file
from lt4rec_sparse.ranker.features import EncodedFeatures, FeatureEncoder
from lt4rec_sparse.ranker.features import raw as raw_columns
from lt4rec_sparse.ranker.features.schema import Column
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.ranker.module import RankerModule
from lt4rec_sparse.ranker.ranking import Ranking, checked_factor, checked_k, checked_powers, rank_scores, ranking
from lt4rec_sparse.ranker.request import request_engine


class Ranker:
    """Scores candidates for every task in one call.

    Args:
        encoder: Raw values to ids, as fitted in training.
        inputs: Ids to the MLP's input, as trained.
        mlp: The frozen MLP; each task's head has one output and ends in a sigmoid.

    Raises:
        ValueError: If the widths of `inputs` and `mlp` differ, a head has several outputs or no sigmoid, or the inputs
            are not made for the encoder's numbers and attention.
    """

    def __init__(self, encoder: FeatureEncoder, inputs: CrossedEmbeddings, mlp: SparseMLP) -> None:
        if (inputs.numbers, inputs.attention) != (encoder.n_numbers, encoder.attention):
            held = f"{inputs.numbers} numbers and attention {shown(inputs.attention)}"
            wanted = f"{encoder.n_numbers} and {shown(encoder.attention)}, as of the encoder"
            raise ValueError(f"inputs: got {held}, wanted {wanted}")
        if inputs.out_features != mlp.in_features:
            raise ValueError(
                f"mlp: got in_features {mlp.in_features}, wanted {inputs.out_features}, the width of the inputs"
            )
        if mlp.out_features != len(mlp.tasks):
            got = mlp.out_features // len(mlp.tasks)
            raise ValueError(f"mlp: got heads with {got} outputs, wanted one output per task: {', '.join(mlp.tasks)}")
        for task, head in mlp.network.heads.items():
            if head.activation != "sigmoid":
                raise ValueError(
                    f"head of {task}: got activation {head.activation}, wanted sigmoid: freeze(sigmoid=True)"
                )
        self.encoder = encoder
        self.inputs = inputs.eval().requires_grad_(False)
        self.mlp = mlp
        self.tasks = mlp.tasks
        self._engine: tuple[FrozenNetwork, int, ops.RequestEngine | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made anew where it is needed."""
        return self.__dict__ | {"_engine": None}

    @property
    def precision(self) -> str:
        """How the MLP computes: "fp32", "bf16" or "int8"; on a GPU "fp32", "bf16" or "fp16"."""
        return self.mlp.precision

    def to_precision(self, precision: str) -> Ranker:
        """Return the same ranker with its MLP in another precision (`SparseMLP.to_precision`); all else is shared."""
        return Ranker(self.encoder, self.inputs, self.mlp.to_precision(precision))

    def planned(self, plan: Plan) -> Ranker:
        """Return the same ranker with its MLP served by a plan of this CPU: `ranker.mlp.measure_plan()`.

        Raises what `SparseMLP.planned` does.
        """
        return Ranker(self.encoder, self.inputs, self.mlp.planned(plan))

    def on_gpu(
        self,
        precision: str = "bf16",
        plan: Plan | None = None,
        device: torch.device | str = "cuda",
        batch_sizes: Sequence[int] | None = None,
    ) -> Ranker:
        """Return the same ranker with its embeddings and its MLP on a GPU; encoding stays on the CPU.

        Arguments and errors are those of `SparseMLP.on_gpu`; the plan is from `ranker.mlp.measure_plan(device=...)`.
        """
        served = self.mlp.on_gpu(precision, plan, device, batch_sizes)
        return Ranker(self.encoder, copy.deepcopy(self.inputs).to(device), served)

    def to_module(self) -> RankerModule:
        """Return the ranker from ids on as a module, whose MLP is this one; `padded_ids` makes ids for it.

        Encoding raw values stays with `encoder`. Under `torch.export` the MLP is one operator.

        Raises:
            InputError: If the ranker lacks a table.
        """
        return RankerModule(self.inputs, self.mlp, self.tasks)

    def to_dense(self) -> RankerModule:
        """Return the ranker from ids on in float32, of plain modules of torch alone: zeros where masks prune.

        Raises:
            InputError: If the ranker lacks a table.
        """
        return RankerModule(self.inputs, self.mlp.to_dense().float().to(self.inputs.device), self.tasks)

    def to_engine_file(self, path: str | Path, precision: str | None = None) -> None:
        """Write the ranker as an engine file, which csrc/lt4rec.h reads without Python: `write_engine_file`."""
        write_engine_file(self.encoder, self.inputs, self.mlp.network, path, precision or self.precision)

    def score(
        self, batch: Mapping[str, Any], embeddings: Mapping[str, Tensor | NDArray[Any]] | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """Score a batch of candidates from raw values.

        Args:
            batch: Column name -> one value per candidate (list or array; None or NaN is missing; in a multi-valued
                column each is a list of values, or one separated string), or a sequence of one value, which holds for
                all, as of the user of a request. Or a table: a record batch of Arrow, or a data frame. Columns that are
                not features are ignored.
            embeddings: Column name -> vectors that were computed elsewhere, `[candidates, dim]`, or `[1, dim]` for all;
                float32, float16 or bfloat16. They stand in for the column, which `batch` need not have then; of a
                multi-valued one they are the mean of its values' vectors.

        Returns:
            Task name -> probability (or expected ratio) of each candidate, float32 `[candidates]`.

        Raises:
            ValueError: If a feature column is missing, or has neither one row nor as many as the others; if embeddings
                are of no feature, of another shape or dtype, or not finite, or if none are given for a table that the
                ranker was saved without.
        """
        scores = self._score(raw_columns.columns_of(batch), None, embeddings)
        return {task: scores[:, i] for i, task in enumerate(self.tasks)}

    def _score(
        self,
        candidates: Mapping[str, Any],
        context: Mapping[str, Any] | None,
        embeddings: Mapping[str, Tensor | NDArray[Any]] | None,
    ) -> NDArray[np.float32]:
        """Score raw columns, `[rows, tasks]`: in one call of the engine where it reads them all."""
        given = {column: _vectors(column, vectors) for column, vectors in (embeddings or {}).items()}
        engine = self._request_engine()
        if engine is not None and self.inputs.can_take(given):
            floats = {column: rows.to("cpu", torch.float32).contiguous() for column, rows in given.items()}
            if self.mlp.has_engine:
                scores = engine.score(candidates, context, floats)
                if scores is not None:
                    return scores.numpy()
            else:
                x = engine.inputs(candidates, context, floats)
                if x is not None:
                    return self._scores_of(x).numpy()
        columns = _together(candidates, context or {})
        features = self.encoder.encode(columns, {column: len(vectors) for column, vectors in given.items()})
        return self.score_encoded(features, given).cpu().numpy()

    def _request_engine(self) -> ops.RequestEngine | None:
        """Return the engine's request, made when it is first needed, or again if the model has changed."""
        network, address = self.mlp.network, self.inputs.address  # which `.to` and `.data` change too
        if self._engine is None or self._engine[0] is not network or self._engine[1] != address:
            self._engine = network, address, request_engine(self.encoder, self.inputs, self.mlp)
        return self._engine[2]

    def rank(
        self,
        candidates: Mapping[str, Any],
        context: Mapping[str, Any] | None = None,
        k: int | None = None,
        *,
        by: Mapping[str, float] | None = None,
        embeddings: Mapping[str, Tensor | NDArray[Any]] | None = None,
    ) -> Ranking:
        """Rank the candidates of one request.

        Example:
            `ranker.rank({"video_id": [7, 9]}, context={"age": [31]}, k=1)` returns the better of the two.

        Args:
            candidates: Column name -> one value per candidate, or a table, as in `score`; at least one column.
            context: Column name -> a sequence of one value: what all candidates have in common, as the user's
                features. It is encoded and computed with once.
            k: How many candidates to return; None for all.
            by: Task or column name -> exponent: the rank score is the product of `value ** exponent`. A column is one
                of numbers, such as a video's length. None: the product of all tasks' scores.
            embeddings: As in `score`.

        Raises:
            ValueError: As `score` does; if a column is in both parts, one of `context` has several rows, `k` is below
                1, `by` names neither a task nor a column of finite numbers of at least 0, or a rank score is infinite
                or NaN.

        Source: LT4REC (arXiv 2008.09872), Eq 3.
        """
        k, powers = checked_k(k), dict.fromkeys(self.tasks, 1.0) if by is None else checked_powers(by)
        candidates = raw_columns.columns_of(candidates)
        context = None if context is None else raw_columns.columns_of(context)
        columns = {**candidates, **(context or {})}
        if context is not None and len(columns) < len(candidates) + len(context):
            twice = next(name for name in context if name in candidates)
            raise InputError(f"column {twice!r}: got it in candidates and in context, wanted it in one of them")
        numbers = {name: _numbers(name, columns) for name in powers if name not in self.tasks}
        of_tasks = self._score(candidates, context, embeddings)
        scores = {task: of_tasks[:, i] for i, task in enumerate(self.tasks)}
        of_columns = {name: _repeated(name, values, len(of_tasks)) for name, values in numbers.items()}
        return ranking(scores, rank_scores({**scores, **of_columns}, powers), k)

    @torch.inference_mode()
    def score_encoded(self, features: EncodedFeatures, embeddings: Mapping[str, Tensor] | None = None) -> Tensor:
        """Score encoded candidates: `[batch, tasks]`, float32, on the device of the ranker's embeddings.

        `embeddings` and errors are those of `CrossedEmbeddings.embed`.
        """
        engine = self._request_engine()
        if engine is not None and self.mlp.has_engine:
            self.inputs.check(embeddings or {}, features.batch)
            given = {column: rows.to("cpu", torch.float32).contiguous() for column, rows in (embeddings or {}).items()}
            parts = (features.single, features.multi_values, features.multi_offsets)
            single, values, offsets = (part.to("cpu", torch.int64).contiguous() for part in parts)
            found = engine.score_ids(single, values, offsets, given)
            if found is not None:
                return found
        if self.inputs.device.type != "cpu":
            features = features.to(self.inputs.device)
        return self._scores_of(self.inputs(features, embeddings))

    def _scores_of(self, x: Tensor) -> Tensor:
        scores = x.new_empty(len(x), self.mlp.out_features)
        self.mlp.score_into(x, scores)
        return scores

    @property
    def prepacked_nbytes(self) -> int:
        """Bytes of what is prepacked of the MLP so far: for requests, and by the MLP for calls of its own."""
        of_requests = 0 if self._engine is None or self._engine[2] is None else self._engine[2].prepacked_nbytes
        return of_requests + sum(self.mlp.prepacked_nbytes.values())


def _together(candidates: Mapping[str, Any], context: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a request: those of one row hold for all candidates."""
    for name, values in context.items():
        rows = raw_columns.rows_of(Column(name, "multi"), values)
        if rows != 1:
            raise InputError(f"column {name!r}: got {rows} rows in context, wanted 1")
    return {**candidates, **context}


def _numbers(name: str, columns: Mapping[str, Any]) -> NDArray[np.float64]:
    """Return the numbers of a column that rank scores are made of."""
    if name not in columns:
        raise InputError(f"by: got {name!r}, wanted a task or a column of the request")
    column = Column(name, "dense")
    raw_columns.rows_of(column, columns[name])  # which refuses what is no sequence
    values, present = raw_columns.single(column, columns[name])
    numbers = np.full(len(present), np.nan)
    numbers[present] = values
    return checked_factor(name, numbers)


def _repeated(name: str, numbers: NDArray[np.float64], batch: int) -> NDArray[np.float64]:
    """Return numbers of a column for `batch` rows; a single one holds for all."""
    if len(numbers) not in (1, batch):
        raise InputError(f"column {name!r}: got {len(numbers)} rows, wanted {batch}, or 1")
    return np.broadcast_to(numbers, batch)


def _vectors(column: str, vectors: Tensor | NDArray[Any]) -> Tensor:
    """Return a column's given vectors as a tensor of rows; `CrossedEmbeddings` checks the rest."""
    is_array = isinstance(vectors, np.ndarray) and vectors.dtype in (np.float32, np.float16)
    if not (is_array or isinstance(vectors, Tensor)) or vectors.ndim != 2:
        shape = getattr(vectors, "shape", None)
        got = type(vectors).__name__ if shape is None else f"{vectors.dtype} {list(shape)}"
        wanted = "a tensor, or an array of float32 or float16, [candidates, dim]"
        raise InputError(f"embeddings of {column!r}: got {got}, wanted {wanted}")
    if isinstance(vectors, Tensor):
        return vectors
    # torch warns of an array that it could write to but must not, and takes no negative strides; such ones are copied.
    return torch.from_numpy(np.require(vectors, requirements=["C", "W"]))
