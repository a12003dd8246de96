"""What the Triton kernels of both operations share. Apart from _triton.py, which is imported where Triton is not."""

from __future__ import annotations

import triton
import triton.language as tl

NORM_EPS_SQUARED = tl.constexpr(1e-24)  # densecl_ops._numerics.NORM_EPS squared


@triton.jit
def inverse_norm(squares):
    """1 / |vector| from the sum of its squares, 0 for one with no direction, NaN for one whose square overflows."""
    inverse = tl.where(squares > NORM_EPS_SQUARED, 1.0 / tl.sqrt(squares), 0.0)
    return tl.where(squares == float("inf"), float("nan"), inverse)
