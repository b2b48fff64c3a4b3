"""What every kernel does with its sums before it stores them."""

import triton
import triton.language as tl


@triton.jit
def epilogue(acc, bias_ptr, offsets, is_column, ACTIVATION: tl.constexpr):
    """Return `activation(acc + bias)`, float32, where column `j` of `acc` has its bias at `offsets[j]`."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offsets, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "relu":
        acc = tl.where(acc < 0, 0.0, acc)  # NaN stays NaN
    elif ACTIVATION == "sigmoid":
        acc = tl.sigmoid(acc)
    return acc
