"""rANS on a CPU, compiled by Numba; it releases the GIL.

Numbers have 64 bits and no sign, and lanes are taken by fours: what the compiler knows of an index, it need not
compute, and four symbols do not wait for each other.
"""

from typing import Any

import numpy as np
from numba import njit, uint64
from numpy.typing import NDArray

from litropy.kernels import rans_ceiling, rans_tables
from litropy.kernels.rans_stream import LANES, LOWEST_STATE, RansStream
from litropy.kernels.rans_tables import PRECISION, TOTAL, alias_tables, decoding_table
from litropy.kernels.tensor_codec_planes import Bytes, read_only

__all__ = ["decode_stream", "encode_segments", "fill_buckets", "search_ceiling"]

_ONE, _TWO, _THREE, _FOUR, _LANES, _LAST = (uint64(n) for n in (1, 2, 3, 4, LANES, LANES - 1))
_LOWEST, _MASK, _BITS, _WORD, _SYMBOL = (uint64(n) for n in (LOWEST_STATE, TOTAL - 1, PRECISION, 16, 24))
# x // f = x (2^44 // f + 1) >> 44 for all x < 2^20 f, and the product stays below 2^64, because f <= 2^12
_RECIPROCAL = 44
_SHIFT = uint64(_RECIPROCAL)

search_ceiling = njit(nogil=True, cache=True, error_model="numpy")(rans_ceiling.search_ceiling)
fill_buckets = njit(nogil=True, cache=True, error_model="numpy")(rans_tables.fill_buckets)


@njit(nogil=True, cache=True, error_model="numpy")
def _encoding_slots(divider: Any, first: Any, second: Any, start: Any, slots: Any) -> None:
    """The slot of each symbol's ranks, which stand in ``slots`` [4096] from the symbol's ``start`` on."""
    slot, capacity = uint64(0), uint64(TOTAL // divider.size)
    for bucket in range(divider.size):
        begin = slot
        for part in range(2):
            entry = uint64(second[bucket] if part else first[bucket])
            end = begin + (capacity if part else uint64(divider[bucket]))
            while slot < end:
                slots[start[entry >> _SYMBOL] + ((entry + slot - begin) & _MASK)] = slot
                slot += _ONE


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _push(x: Any, lane: Any, symbol: Any, rows: Any, slots: Any, words: Any, end: Any) -> Any:
    """Code a symbol by the state of a lane; returns where the next word goes."""
    row, state = uint64(symbol) << _TWO, x[lane]
    # written in any case, and kept where the state is too large
    words[end] = state
    full = uint64(state >= rows[row])
    state >>= full << _FOUR
    quotient = (state * rows[row + _ONE]) >> _SHIFT
    x[lane] = (quotient << _BITS) | uint64(slots[rows[row + _TWO] + state - quotient * rows[row + _THREE]])
    return end - full


@njit(nogil=True, cache=True, error_model="numpy")
def _encode(symbols: Any, rows: Any, slots: Any, words_of: Any, states: Any, words: Any, segment_size: int) -> int:
    """Fill words from the end; returns where they start. ``words`` has room for one word a symbol, and one more."""
    end = uint64(words.size - 1)
    x = np.empty(LANES, np.uint64)
    for segment in range(words_of.size - 1, -1, -1):
        x[:] = _LOWEST
        last = end
        part = symbols[segment * segment_size : (segment + 1) * segment_size]
        at = uint64(part.size)
        while at & _LAST:
            at -= _ONE
            end = _push(x, at & _LAST, part[at], rows, slots, words, end)
        while at:
            lane = _LANES
            while lane:
                at -= _FOUR
                lane -= _FOUR
                s0, s1, s2, s3 = part[at], part[at + _ONE], part[at + _TWO], part[at + _THREE]
                end = _push(x, lane + _THREE, s3, rows, slots, words, end)
                end = _push(x, lane + _TWO, s2, rows, slots, words, end)
                end = _push(x, lane + _ONE, s1, rows, slots, words, end)
                end = _push(x, lane, s0, rows, slots, words, end)
        states[segment] = x
        words_of[segment] = last - end
    return int(end) + 1


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _pull(x: Any, lane: Any, table: Any, words: Any, position: Any, out: Any, at: Any) -> Any:
    """Decode a symbol; returns where the next word stands."""
    state = x[lane]
    entry = uint64(table[state & _MASK])
    out[at] = entry >> _SYMBOL
    state = (((entry >> _BITS) & _MASK) + _ONE) * (state >> _BITS) + (entry & _MASK)
    refilled = (state << _WORD) | uint64(words[position])
    needed = state < _LOWEST
    x[lane] = refilled if needed else state
    return position + uint64(needed)


@njit(nogil=True, cache=True, error_model="numpy")
def _decode(table: Any, words_of: Any, states: Any, words: Any, out: Any, segment_size: int) -> bool:
    """Symbols to ``out``; False where words run out or are left, or a state does not end as it must.

    ``words`` has 32 more than the segments have, which a step may read but not use.
    """
    position, end = uint64(0), uint64(0)
    x = np.empty(LANES, np.uint64)
    for segment in range(words_of.size):
        x[:] = states[segment]
        end += uint64(words_of[segment])
        part = out[segment * segment_size : (segment + 1) * segment_size]
        at, whole = uint64(0), uint64(part.size) & ~_LAST
        while at < whole:
            if position > end:
                return False
            lane = uint64(0)
            while lane < _LANES:
                position = _pull(x, lane, table, words, position, part, at)
                position = _pull(x, lane + _ONE, table, words, position, part, at + _ONE)
                position = _pull(x, lane + _TWO, table, words, position, part, at + _TWO)
                position = _pull(x, lane + _THREE, table, words, position, part, at + _THREE)
                at += _FOUR
                lane += _FOUR
        if position > end:
            return False
        while at < uint64(part.size):
            position = _pull(x, at & _LAST, table, words, position, part, at)
            at += _ONE
        if position != end:
            return False
        for lane in range(LANES):
            if x[lane] != _LOWEST:
                return False
    return True


def encode_segments(
    symbols: Bytes, present: Bytes, frequency: NDArray[np.uint16], segment: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint16]]:
    """Words of each segment [S], states [S, 32] and words of symbols [n]; those above all present count as the last."""
    f = frequency.astype(np.uint64)
    start = np.zeros(256, np.uint64)
    start[present] = np.cumsum(f) - f
    slots = np.empty(TOTAL, np.uint16)
    _encoding_slots(*alias_tables(present, frequency), start, slots)
    # of each symbol: from which state on a word is due, the reciprocal, where its slots start, its frequency
    rows = np.zeros((256, 4), np.uint64)
    rows[present, 0], rows[present, 1] = f << (32 - PRECISION), (1 << _RECIPROCAL) // f + 1
    rows[present, 2], rows[present, 3] = start[present], f
    rows[present[-1] :] = rows[present[-1]]
    segments = -(-symbols.size // segment)
    words_of, states = np.empty(segments, np.uint32), np.empty((segments, LANES), np.uint32)
    words = np.empty(symbols.size + 1, np.uint16)
    begin = _encode(read_only(symbols), rows.reshape(-1), slots, words_of, states, words, segment)
    return words_of, states, words[begin:]


def decode_stream(stream: RansStream, out: Bytes) -> None:
    """Decode into ``out`` [n].

    Raises:
        ValueError: when the states or words are damaged.
    """
    words = np.concatenate([stream.words, np.zeros(LANES, np.uint16)])
    table = decoding_table(stream.tables)
    if not _decode(table, read_only(stream.words_of), read_only(stream.states), words, out, stream.segment):
        raise ValueError("a rANS stream does not end where it must: its states or words are damaged")
