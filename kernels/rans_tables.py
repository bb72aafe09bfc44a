"""Frequencies of symbols, and the tables that rANS decoding looks them up in.

A state x below 2^32 carries the symbols to come. With frequencies f that sum to 2^12, a step of decoding is

    slot = x mod 2^12, the j-th of symbol s      x' = f_s (x >> 12) + j      x'' = x' < 2^16 ? 2^16 x' + word : x'

Each symbol owns f_s slots, ranked from 0. Which ones is decided by the alias method: the 4096 slots are cut into 32 or
256 buckets, and a bucket holds slots of at most two symbols, those of the first before those of the second. So a symbol
and its rank are found in three tables of one number a bucket, small enough for the registers of a warp:

    w = slot mod (4096 / buckets)      entry = w < divider[bucket] ? first[bucket] : second[bucket]
    entry = symbol 2^24 + (f - 1) 2^12 + bias      j = (w + bias) mod 2^12

A CPU looks them up in one table of 4096 such entries with the rank in place of the bias.

Reference: Duda, "Asymmetric numeral systems", 2013; Vose, "A linear algorithm for generating random numbers with a
given distribution", 1991.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from litropy.kernels.tensor_codec_planes import Bytes

__all__ = [
    "PRECISION",
    "TOTAL",
    "AliasTables",
    "EncodingTables",
    "alias_tables",
    "decoding_table",
    "encoding_tables",
    "frequencies",
]

PRECISION = 12
TOTAL = 1 << PRECISION
# alphabets of at most so many symbols get as many buckets as a warp has lanes; others get one for every byte
FEW_SYMBOLS = 32


class AliasTables(NamedTuple):
    """What decoding on a GPU reads: one entry a bucket."""

    divider: NDArray[np.uint32]
    first: NDArray[np.uint32]
    second: NDArray[np.uint32]


class EncodingTables(NamedTuple):
    """What encoding reads: the inverse of ``decoding_table``."""

    frequency: NDArray[np.uint32]  # [256]
    start: NDArray[np.uint32]  # [256], where a symbol's slots start in the next
    slot: NDArray[np.uint16]  # [4096], by symbol and rank


def frequencies(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts [256], not all 0, scaled to sum to 4096: at least 1 for each symbol that occurs, and few bits lost.

    Example:
        >>> frequencies(np.array([3, 1, 0, 1_000_000]))
        array([   1,    1,    0, 4094])
    """
    present = counts > 0
    scaled = counts * (TOTAL / counts.sum())
    result = np.where(present, np.maximum(np.rint(scaled), 1), 0).astype(np.int64)
    # what rounding left over goes where a slot more or less costs fewest bits
    while (missing := TOTAL - int(result.sum())) != 0:
        if missing > 0:
            gain = np.where(present, counts * np.log1p(1 / np.maximum(result, 1)), -1.0)
            result[gain.argmax()] += 1
        else:
            cost = np.where(result > 1, -counts * np.log1p(-1 / np.maximum(result, 2)), np.inf)
            result[cost.argmin()] -= 1
    return result


def alias_tables(symbols: Bytes, frequency: NDArray[np.uint16]) -> AliasTables:
    """The buckets for an alphabet.

    Args:
        symbols: those that occur, ascending, [K].
        frequency: of each, at least 1, sum 4096, [K].

    Returns:
        Tables of 32 entries, or 256 for more than 32 symbols.

    Example:
        >>> tables = alias_tables(np.array([7, 9], np.uint8), np.array([64, 4032], np.uint16))
        >>> tables.divider[:3], tables.first[0] >> 24, tables.second[0] >> 24, tables.second[2] >> 24
        (array([ 64, 128,   0], dtype=uint32), np.uint32(7), np.uint32(9), np.uint32(9))
    """
    buckets = FEW_SYMBOLS if len(symbols) <= FEW_SYMBOLS else 256
    capacity = TOTAL // buckets
    left = [int(f) for f in frequency] + [0] * (buckets - len(frequency))
    codes = [(int(s) << 24) | ((int(f) - 1) << 12) for s, f in zip(symbols, frequency, strict=True)]
    codes += [0] * (buckets - len(codes))
    divider, second = [capacity] * buckets, [0] * buckets
    small = [b for b in range(buckets) if left[b] < capacity]
    large = [b for b in range(buckets) if left[b] > capacity]
    # every bucket that a symbol does not fill is filled up with slots of a symbol that has too many: its highest ranks
    while small:
        bucket, donor = small.pop(), large[-1]
        divider[bucket] = left[bucket]
        left[donor] -= capacity - left[bucket]
        second[bucket] = codes[donor] | ((left[donor] - divider[bucket]) % TOTAL)
        if left[donor] <= capacity:
            large.pop()
            if left[donor] < capacity:
                small.append(donor)
    return AliasTables(*(np.array(table, np.uint32) for table in (divider, codes, second)))


def decoding_table(tables: AliasTables) -> NDArray[np.uint32]:
    """The entry of every slot, [4096]: symbol 2^24 + (f - 1) 2^12 + rank."""
    capacity = TOTAL // len(tables.divider)
    within = np.tile(np.arange(capacity, dtype=np.uint32), len(tables.divider))
    first, second = np.repeat(tables.first, capacity), np.repeat(tables.second, capacity)
    entry = np.where(within < np.repeat(tables.divider, capacity), first, second)
    return (entry & ~np.uint32(TOTAL - 1)) | ((entry + within) & np.uint32(TOTAL - 1))


def encoding_tables(symbols: Bytes, frequency: NDArray[np.uint16]) -> EncodingTables:
    """Which slot a symbol's rank has."""
    table = decoding_table(alias_tables(symbols, frequency))
    by_symbol = np.zeros(256, np.uint32)
    by_symbol[symbols] = frequency
    start = np.cumsum(by_symbol, dtype=np.uint32) - by_symbol
    slot = np.empty(TOTAL, np.uint16)
    slot[start[table >> 24] + (table & (TOTAL - 1))] = np.arange(TOTAL, dtype=np.uint16)
    return EncodingTables(by_symbol, start, slot)
