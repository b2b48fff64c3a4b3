"""Which dtype trains faster on this machine."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from lt4rec_sparse.stopwatch import interleaved, one_thread

SHAPE = (64, 512, 512)  # rows, in_features, out_features: a layer of the default MLP


def fastest_dtype() -> str:
    """Return "bfloat16" where this machine multiplies faster in it than in float32, else "float32".

    The speed is measured, in one thread and about 50 ms: processors without AVX-512 BF16 or AMX emulate bfloat16 (8
    times slower on AVX2), and the environment may limit a capability. The two dtypes are far apart either way.
    """
    rows, k, n = SHAPE
    x, weight = torch.ones(rows, k), torch.ones(n, k)
    low = x.bfloat16(), weight.bfloat16()
    with one_thread():
        calls = {"float32": partial(F.linear, x, weight), "bfloat16": partial(F.linear, *low)}
        times = interleaved(calls, rounds=3, round_us=1.0)
    return "bfloat16" if times["bfloat16"].p20_us < times["float32"].p20_us else "float32"
