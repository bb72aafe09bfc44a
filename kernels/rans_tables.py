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

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from litropy.kernels.tensor_codec_planes import Bytes, numba_loops

__all__ = [
    "PRECISION",
    "TOTAL",
    "AliasTables",
    "EncodingTables",
    "alias_tables",
    "decoding_table",
    "encoding_tables",
    "fill_buckets",
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
    present = np.flatnonzero(counts)
    own = counts[present].astype(np.float64)
    few = own < own.sum() / TOTAL
    # those that get a slot although they have less than a slot's share leave fewer to the others
    shared = np.rint(own * ((TOTAL - few.sum()) / own[~few].sum()))
    slots = np.where(few, 1, np.maximum(shared, 1)).astype(np.int64)
    # what rounding left over goes where a slot more or less costs fewest bits
    while (missing := TOTAL - int(slots.sum())) != 0:
        if missing > 0:
            best = np.argsort(-own * np.log1p(1 / slots))[:missing]
            slots[best] += 1
        else:
            spare = np.flatnonzero(slots > 1)
            best = spare[np.argsort(-own[spare] * np.log1p(-1 / slots[spare]))[:-missing]]
            slots[best] -= 1
    result = np.zeros(len(counts), np.int64)
    result[present] = slots
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
    left, codes = np.zeros(buckets, np.int64), np.zeros(buckets, np.int64)
    left[: len(frequency)] = frequency
    codes[: len(frequency)] = (symbols.astype(np.int64) << 24) | ((left[: len(frequency)] - 1) << PRECISION)
    divider, second = np.full(buckets, capacity), np.zeros(buckets, np.int64)
    fill = fill_buckets
    if numba_loops() is not None:
        from litropy.kernels.rans_numba import fill_buckets as fill
    fill(left, codes, divider, second, capacity)
    return AliasTables(*(table.astype(np.uint32) for table in (divider, codes, second)))


def fill_buckets(left: Any, codes: Any, divider: Any, second: Any, capacity: int) -> None:
    """Fill every bucket that a symbol does not, up with slots of a symbol that has too many: its highest ranks."""
    small, large = np.empty(left.size, np.int64), np.empty(left.size, np.int64)
    smalls, larges = 0, 0
    for b in range(left.size):
        if left[b] < capacity:
            small[smalls] = b
            smalls += 1
        elif left[b] > capacity:
            large[larges] = b
            larges += 1
    while smalls:
        smalls -= 1
        bucket, donor = small[smalls], large[larges - 1]
        divider[bucket] = left[bucket]
        left[donor] -= capacity - left[bucket]
        second[bucket] = codes[donor] | ((left[donor] - divider[bucket]) % TOTAL)
        if left[donor] <= capacity:
            larges -= 1
            if left[donor] < capacity:
                small[smalls] = donor
                smalls += 1


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
