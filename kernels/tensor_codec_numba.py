"""Loops over words and bytes, compiled by Numba when they are first called, and kept on disk for later processes.

They release the GIL. Sizes are the callers' to check: Numba checks no index.
"""

from typing import Any

import numpy as np
from numba import njit

__all__ = ["histogram", "merge", "split", "subtract"]

# words between memory and the planes, which stay in the first cache
_BLOCK = 2048
_ROTATE, _ZIGZAG = 1, 2


# slices instead of offsets, here and below: an index that cannot be negative lets the loops become vector instructions
@njit(nogil=True, cache=True, error_model="numpy")
def split(x: Any, kind: int, base: Any, first: int, planes: Any) -> None:
    """Planes ``first`` and on of words [n], to planes [m, n]; a base of size 0 stands for zeros."""
    width = x.itemsize
    scratch = np.empty(_BLOCK, x.dtype)
    for start in range(0, x.size, _BLOCK):
        block = x[start : start + _BLOCK]
        r = scratch[: block.size]
        if kind == _ROTATE:
            if width == 2:
                _rotate(block, 15, r)
            elif width == 4:
                _rotate(block, 31, r)
            else:
                _rotate(block, 63, r)
        elif kind == _ZIGZAG and base.size:
            other = base[start : start + _BLOCK]
            for i in range(r.size):
                r[i] = block[i] - other[i]
        else:
            for i in range(r.size):
                r[i] = block[i]
        if kind == _ZIGZAG:
            if width == 1:
                _zigzag(r, 7)
            elif width == 2:
                _zigzag(r, 15)
            elif width == 4:
                _zigzag(r, 31)
            else:
                _zigzag(r, 63)
        for k in range(planes.shape[0]):
            plane = planes[k, start : start + _BLOCK]
            lower = width - 1 - first - k
            if lower == 0:
                _byte(r, 0, plane)
            elif lower == 1:
                _byte(r, 8, plane)
            elif lower == 2:
                _byte(r, 16, plane)
            elif lower == 3:
                _byte(r, 24, plane)
            else:
                _byte(r, 8 * lower, plane)


# shifts by what the compiler knows are vector instructions of the words' own width, others of 64 bits
@njit(nogil=True, cache=True, error_model="numpy")
def _rotate(x: Any, top: int, out: Any) -> None:
    for i in range(out.size):
        out[i] = (x[i] << 1) | (x[i] >> top)


@njit(nogil=True, cache=True, error_model="numpy")
def _rotate_back(x: Any, top: int, out: Any) -> None:
    for i in range(out.size):
        out[i] = (x[i] >> 1) | (x[i] << top)


@njit(nogil=True, cache=True, error_model="numpy")
def _zigzag(x: Any, top: int) -> None:
    for i in range(x.size):
        x[i] = (x[i] << 1) ^ -(x[i] >> top)


@njit(nogil=True, cache=True, error_model="numpy")
def _byte(x: Any, lower: int, out: Any) -> None:
    for i in range(out.size):
        out[i] = x[i] >> lower


@njit(nogil=True, cache=True, error_model="numpy")
def merge(planes: Any, kind: int, base: Any, out: Any) -> None:
    """Planes, a tuple of arrays [n], to words [n]."""
    width = len(planes)
    scratch = np.empty(_BLOCK, out.dtype)
    for start in range(0, out.size, _BLOCK):
        block = out[start : start + _BLOCK]
        r = scratch[: block.size]
        plane = planes[0][start : start + _BLOCK]
        for i in range(r.size):
            r[i] = plane[i]
        for k in range(1, width):
            plane = planes[k][start : start + _BLOCK]
            for i in range(r.size):
                r[i] = (r[i] << 8) | plane[i]
        if kind == _ROTATE:
            if width == 2:
                _rotate_back(r, 15, block)
            elif width == 4:
                _rotate_back(r, 31, block)
            else:
                _rotate_back(r, 63, block)
        elif kind == _ZIGZAG:
            for i in range(r.size):
                block[i] = (r[i] >> 1) ^ -(r[i] & 1)
            if base.size:
                other = base[start : start + _BLOCK]
                for i in range(r.size):
                    block[i] += other[i]
        else:
            for i in range(r.size):
                block[i] = r[i]


@njit(nogil=True, cache=True, error_model="numpy")
def histogram(symbols: Any) -> Any:
    """How often each byte occurs, [256] int64."""
    # eight tables: equal neighbours need not wait for each other
    counts, one = np.zeros((8, 256), np.uint32), np.uint32(1)
    whole = symbols.size // 8 * 8
    for start in range(0, whole, 8):
        eight = symbols[start : start + 8]
        for k in range(8):
            counts[k, eight[k]] += one
    for i in range(whole, symbols.size):
        counts[0, symbols[i]] += one
    total = np.zeros(256, np.int64)
    for row in counts:
        for symbol in range(256):
            total[symbol] += row[symbol]
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def subtract(symbols: Any, group: int, middle: int, offsets: Any, rest: Any) -> None:
    """Each group's mean less ``middle``, modulo 256, to ``offsets``; the symbols less that to ``rest``."""
    for k in range(offsets.size):
        part, out = symbols[k * group : (k + 1) * group], rest[k * group : (k + 1) * group]
        total = 0
        for i in range(part.size):
            total += part[i]
        offset = (total + part.size // 2) // part.size - middle
        offsets[k] = offset
        for i in range(part.size):
            out[i] = part[i] - offset
