"""The hyperbolic tangent for Triton kernels."""

import triton
import triton.language as tl

__all__ = ["tanh"]


@triton.jit
def tanh(x):
    """Hyperbolic tangent to float32 rounding: a series near 0, where the quotient would cancel."""
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    x2 = x * x
    series = x * (1.0 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * (62.0 / 2835)))))
    return tl.where(a < 0.25, series, tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e))
