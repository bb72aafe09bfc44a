"""Words of a tensor to planes of bytes and back, exactly: only integers are touched, so every NaN keeps its payload.

A word x of n bits is an element, or half of a complex one. It becomes a word r whose first bytes say little:

    floats of 16 bits and more    r = x rotated left by one: the exponent comes first, the sign last
    signed integers, deltas       d = x - base mod 2^n (base 0 without a delta), r = (d << 1) xor (d >> n - 1), zig-zag
    all others                    r = x

Byte k of all r, most significant first, is plane k. Of a bfloat16, plane 0 is its exponent and plane 1 its mantissa and
sign; of a float32, planes 1 to 3 are.
"""

import functools
import importlib
import importlib.util
import sys
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "ROTATE", "Bytes", "Words", "count_bytes", "merge_planes", "merge_planes_torch", "numba_loops", "read_only",
    "scratch_planes", "split_planes", "transform", "word_bytes", "words",
]  # fmt: skip

Bytes = NDArray[np.uint8]
Words = NDArray[Any]  # unsigned, of any width
PLAIN, ROTATE, ZIGZAG = 0, 1, 2
# words that NumPy works on at once, so that they stay in the cache
_BLOCK = 16384
# below this many words loading compiled loops would take longer than NumPy does
_FEW = 65536
_threads = threading.local()


@functools.cache
def numba_loops() -> ModuleType | None:
    """The compiled loops, or None without Numba."""
    if importlib.util.find_spec("numba") is None:
        return None
    return importlib.import_module("litropy.kernels.tensor_codec_numba")


def _loops(count: int) -> ModuleType | None:
    """The compiled loops where they are loaded already, or so many words are worth it."""
    return numba_loops() if count >= _FEW or "litropy.kernels.tensor_codec_numba" in sys.modules else None


def read_only(x: NDArray[Any]) -> NDArray[Any]:
    """A view that cannot be written: one type for Numba to compile for, wherever the memory is from."""
    x = x.view()
    x.setflags(write=False)
    return x


def word_bytes(dtype: torch.dtype) -> int:
    """Bytes of a word: of an element, or of half a complex one."""
    return dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize


def words(values: Tensor) -> Words:
    """Contiguous CPU values [n] as unsigned integers that share their memory."""
    return values.view(torch.uint8).numpy().view(f"<u{word_bytes(values.dtype)}")


def transform(dtype: torch.dtype, delta: bool) -> int:
    """Which of the three transforms words of a dtype get."""
    if delta:
        return ZIGZAG
    if word_bytes(dtype) == 1:
        return PLAIN
    if dtype.is_floating_point or dtype.is_complex:
        return ROTATE
    return ZIGZAG if dtype.is_signed else PLAIN


def count_bytes(plane: Bytes) -> NDArray[np.int64]:
    """How often each byte occurs, [256]."""
    loops = _loops(plane.size)
    counts: NDArray[np.int64] = (
        np.bincount(plane, minlength=256) if loops is None else loops.histogram(read_only(plane))
    )
    return counts


def split_planes(x: Words, kind: int, base: Words | None, out: Bytes | None = None, first: int = 0) -> Bytes:
    """Words [n] to planes [bytes of a word, n], or in ``out`` [m, n] to m of them, of which ``first`` is the first."""
    if out is None:
        if x.itemsize == 1 and kind == PLAIN:
            return x.view(np.uint8)[None]
        out = np.empty((x.itemsize, x.size), np.uint8)
    loops = _loops(x.size)
    if loops is not None:
        loops.split(read_only(x), kind, read_only(x[:0] if base is None else base), first, out)
        return out
    bits = 8 * x.itemsize
    for start in range(0, x.size, _BLOCK):
        r = x[start : start + _BLOCK]
        if kind == ROTATE:
            r = (r << 1) | (r >> (bits - 1))
        elif kind == ZIGZAG:
            r = r if base is None else r - base[start : start + _BLOCK]
            r = (r << 1) ^ (0 - (r >> (bits - 1)))
        for k, plane in enumerate(out, first):
            plane[start : start + _BLOCK] = r >> (bits - 8 - 8 * k)
    return out


def scratch_planes(x: Words, kind: int, base: Words | None, first: int, count: int) -> Bytes:
    """As ``split_planes``, in memory that this thread's next call gives out again, or the words' own."""
    if x.itemsize == 1 and kind == PLAIN:
        return x.view(np.uint8)[None]
    size = count * x.size
    if not hasattr(_threads, "planes") or _threads.planes.size < size:
        _threads.planes = np.empty(size, np.uint8)
    return split_planes(x, kind, base, _threads.planes[:size].reshape(count, x.size), first)


def merge_planes(planes: Sequence[Bytes], kind: int, base: Words | None, out: Words) -> None:
    """The inverse of ``split_planes``: planes, each [n], to words [n]."""
    loops = _loops(out.size)
    if loops is not None:
        loops.merge(tuple(map(read_only, planes)), kind, read_only(out[:0] if base is None else base), out)
        return
    bits = 8 * out.itemsize
    for start in range(0, out.size, _BLOCK):
        r = planes[0][start : start + _BLOCK].astype(out.dtype)
        for plane in planes[1:]:
            r = (r << 8) | plane[start : start + _BLOCK]
        if kind == ROTATE:
            r = (r >> 1) | (r << (bits - 1))
        elif kind == ZIGZAG:
            r = (r >> 1) ^ (0 - (r & 1))
            r = r if base is None else r + base[start : start + _BLOCK]
        out[start : start + _BLOCK] = r


_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def merge_planes_torch(planes: Sequence[Tensor], kind: int, base: Tensor | None, out: Tensor) -> None:
    """As ``merge_planes``, with tensors on any device: planes [n] uint8 to values of any dtype."""
    dtype = _SIGNED[word_bytes(out.dtype)]
    bits = 8 * dtype.itemsize
    r = planes[0].to(dtype)
    for plane in planes[1:]:
        r = (r << 8) | plane
    # signed integers shift their sign in, which a mask takes out again
    halved = (r >> 1) & ((1 << (bits - 1)) - 1)
    if kind == ROTATE:
        r = halved | (r << (bits - 1))
    elif kind == ZIGZAG:
        r = halved ^ -(r & 1)
        r = r if base is None else r + base.view(dtype)
    out.view(dtype).copy_(r)
