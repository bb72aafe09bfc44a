"""rANS of bytes under a ceiling; those that reach it stand beside the stream, as they are.

Small differences are mostly 0 and 1, and each of many higher values occurs now and then. In a table of 4096 slots every
one of them takes a slot, more than its share, and three bytes of the stream's head. So bytes from a ceiling on are
coded as the ceiling, and listed; all numbers are little-endian:

    u8       ceiling c
    u32      bytes that reach it, m
    u8 [m]   those, in order, each at least c
    u8 [...] a stream of ``rans_stream``, of min(byte, c), in which c occurs m times
"""

import struct
import sys
from math import log2
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from litropy.kernels.rans_stream import encode_rans
from litropy.kernels.rans_tables import TOTAL
from litropy.kernels.tensor_codec_layout import Buffer
from litropy.kernels.tensor_codec_planes import Bytes, count_bytes

__all__ = [
    "NO_CEILING", "best_ceiling", "encode_clipped", "put_back", "put_back_torch", "search_ceiling", "split_ceiling",
]  # fmt: skip

NO_CEILING = 256
# the least share of a plane's bytes that a ceiling must save: decoding has to put back what reaches it
_LEAST_SAVING = 1 / 2048
# less is nothing: what rounding leaves of counts that are not whole
_ANY = 1e-6
_HEAD = struct.Struct("<BI")


def best_ceiling(counts: NDArray[Any]) -> tuple[int, float]:
    """The ceiling that makes a plane smallest, and its bytes without those of the states.

    Args:
        counts: how often each byte occurs, [256], not all 0.

    Returns:
        1 to 255, or 256 where none is worth it; bytes of a table, of the words and of the list.

    Example:
        >>> counts = np.r_[1_000_000, 30_000, np.full(254, 20)]
        >>> best_ceiling(counts)[0], round(best_ceiling(counts)[1])
        (2, 35335)
    """
    total = float(counts.sum())
    # where that is loaded already: compiled, it is fast, but loading takes longer than many searches
    if "litropy.kernels.rans_numba" in sys.modules:
        from litropy.kernels.rans_numba import search_ceiling as compiled

        ceiling, size, without = compiled(counts.astype(np.float64), total)
    else:
        ceiling, size, without = search_ceiling(counts.astype(np.float64).tolist(), total)
    if without - size < _LEAST_SAVING * total:
        return NO_CEILING, without
    return ceiling, size


def search_ceiling(counts: Any, total: float) -> tuple[int, float, float]:
    """The ceiling that saves most, bytes under it and bytes without one; of counts and their sum."""
    # of the bytes below a ceiling: their number, slots (at least one, which then share what there is) and bits
    alphabet, slots, bits, above = 0, 0.0, 0.0, total
    best, least = NO_CEILING, np.inf
    for byte in range(256):
        if byte > 0 and above > _ANY:
            reached = max(above / total, 1 / TOTAL)
            size = (bits - above * log2(reached) + total * log2(slots + reached)) / 8 + above + 3 * (alphabet + 1)
            if size < least:
                best, least = byte, size
        count = counts[byte]
        if count > 0:
            own = max(count / total, 1 / TOTAL)
            alphabet, slots, bits, above = alphabet + 1, slots + own, bits - count * log2(own), above - count
    return best, least, (bits + total * log2(slots)) / 8 + 3 * alphabet


def encode_clipped(symbols: Bytes, segment: int) -> tuple[int, bytes]:
    """Symbols [n], n > 0, under the best ceiling: that, and the list and the stream, or the stream alone under none."""
    counts = count_bytes(symbols)
    ceiling, _ = best_ceiling(counts)
    if ceiling == NO_CEILING:
        return ceiling, encode_rans(symbols, segment, counts)
    high = symbols[np.flatnonzero(symbols >= ceiling)]
    clipped = np.zeros_like(counts)
    clipped[:ceiling], clipped[ceiling] = counts[:ceiling], len(high)
    return ceiling, _HEAD.pack(ceiling, len(high)) + high.tobytes() + encode_rans(symbols, segment, clipped)


def split_ceiling(data: Buffer, count: int) -> tuple[int, Bytes, memoryview]:
    """The ceiling, the bytes that reach it, and the stream of the others, of ``count`` in all.

    Raises:
        ValueError: when the list cannot be one.
    """
    rest = memoryview(data)
    if len(rest) < _HEAD.size:
        raise ValueError(f"{len(rest)} bytes cannot hold a ceiling and what reaches it")
    ceiling, length = _HEAD.unpack(rest[: _HEAD.size])
    rest = rest[_HEAD.size :]
    if length > min(len(rest), count):
        raise ValueError(f"{length} of {count} symbols are said to reach a ceiling, listed in {len(rest)} bytes")
    high = np.frombuffer(rest[:length], np.uint8)
    if (high < ceiling).any():
        raise ValueError(f"a symbol of {high.min()} is listed among those that reach {ceiling}")
    return ceiling, high, rest[length:]


def put_back(symbols: Bytes, ceiling: int, high: Bytes) -> None:
    """Write what reaches the ceiling to its places among decoded symbols [n].

    Raises:
        ValueError: when there are not as many places.
    """
    at = np.flatnonzero(symbols == ceiling)
    _check(len(at), ceiling, high)
    symbols[at] = high


def put_back_torch(symbols: Tensor, ceiling: int, high: Bytes) -> None:
    """The same on any device."""
    at = (symbols == ceiling).nonzero().flatten()
    _check(len(at), ceiling, high)
    symbols[at] = torch.from_numpy(high.copy()).to(symbols.device)


def _check(places: int, ceiling: int, high: Bytes) -> None:
    if places != len(high):
        raise ValueError(f"{places} symbols reach the ceiling {ceiling}, but {len(high)} are listed")
