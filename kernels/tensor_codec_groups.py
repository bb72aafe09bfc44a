"""Exponents less the mean of their group: what many scales in one tensor cost is paid once a group.

Rows of an embedding that are seen seldom have small moments, others large ones: together their exponents have a bit
more of entropy than each row's have by themselves. A group is 128 consecutive symbols; its mean is kept.

    offset_g = mean of s_i in g, less 64 (modulo 256)      r_i = s_i - offset_g (modulo 256), close to 64
"""

import numpy as np

from litropy.kernels.tensor_codec_planes import Bytes, numba_loops, read_only

__all__ = ["GROUP", "add_offsets", "subtract_offsets"]

GROUP = 128
# where Huffman codes of our own encoder reach on both sides
_MIDDLE = 64


def subtract_offsets(symbols: Bytes) -> tuple[Bytes, Bytes]:
    """Offsets of the groups [ceil(n / 128)], and symbols less those [n].

    Example:
        >>> offsets, rest = subtract_offsets(np.repeat(np.array([100, 120], np.uint8), 128))
        >>> offsets, rest.min(), rest.max()
        (array([36, 56], dtype=uint8), np.uint8(64), np.uint8(64))
    """
    offsets, rest = np.empty(-(-symbols.size // GROUP), np.uint8), np.empty(symbols.size, np.uint8)
    if (loops := numba_loops()) is not None:
        loops.subtract(read_only(symbols), GROUP, _MIDDLE, offsets, rest)
        return offsets, rest
    starts = np.arange(0, symbols.size, GROUP)
    sizes = np.minimum(GROUP, symbols.size - starts)
    sums = np.add.reduceat(symbols, starts, dtype=np.int64)
    offsets[:] = (sums + sizes // 2) // sizes - _MIDDLE & 255
    return offsets, symbols - np.repeat(offsets, sizes)


def add_offsets(rest: Bytes, offsets: Bytes) -> Bytes:
    """The inverse: symbols [n]."""
    out = np.empty(rest.size, np.uint8)
    whole = rest.size // GROUP
    split = whole * GROUP
    np.add(rest[:split].reshape(-1, GROUP), offsets[:whole, None], out=out[:split].reshape(-1, GROUP))
    np.add(rest[split:], offsets[whole:], out=out[split:])
    return out
