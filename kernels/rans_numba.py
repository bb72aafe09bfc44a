"""rANS on a CPU, compiled by Numba; it releases the GIL."""

from typing import Any

import numpy as np
from numba import njit, uint32, uint64
from numpy.typing import NDArray

from litropy.kernels.rans_stream import LANES, LOWEST_STATE, RansStream
from litropy.kernels.rans_tables import PRECISION, TOTAL, EncodingTables, decoding_table
from litropy.kernels.tensor_codec_planes import Bytes, read_only

__all__ = ["decode_stream", "encode_segments"]

_LOWEST, _MASK, _BITS, _FULL = uint32(LOWEST_STATE), uint32(TOTAL - 1), uint32(PRECISION), uint64(32 - PRECISION)
_ONE, _WORD, _SYMBOL = uint32(1), uint32(16), uint32(24)


@njit(nogil=True, cache=True, error_model="numpy")
def _encode(
    symbols: Any, frequency: Any, start: Any, slots: Any, words_of: Any, states: Any, words: Any, segment_size: int
) -> int:
    """Fill words from the end; returns where they start. ``words`` has room for one word a symbol."""
    end = words.size
    x = np.empty(LANES, np.uint32)
    for segment in range(words_of.size - 1, -1, -1):
        x[:] = _LOWEST
        last = end
        first = segment * segment_size
        count = min(symbols.size - first, segment_size)
        for step in range((count - 1) // LANES * LANES, -1, -LANES):
            for lane in range(min(count - step, LANES) - 1, -1, -1):
                symbol = symbols[first + step + lane]
                state, f = x[lane], frequency[symbol]
                if state >= (uint64(f) << _FULL):
                    end -= 1
                    words[end] = state & uint32(0xFFFF)
                    state = state >> _WORD
                quotient = state // f
                x[lane] = (quotient << _BITS) | slots[start[symbol] + (state - quotient * f)]
        states[segment] = x
        words_of[segment] = last - end
    return end


@njit(nogil=True, cache=True, error_model="numpy")
def _decode(table: Any, words_of: Any, states: Any, words: Any, out: Any, segment_size: int) -> bool:
    """Symbols to ``out``; False where words run out or are left, or a state does not end as it must.

    ``words`` has 32 more than the segments have, which a step may read but not use.
    """
    position, end = 0, 0
    x = np.empty(LANES, np.uint32)
    for segment in range(words_of.size):
        x[:] = states[segment]
        end += words_of[segment]
        first = segment * segment_size
        stop = min(first + segment_size, out.size)
        for step in range(first, stop, LANES):
            if position > end:
                return False
            for lane in range(min(LANES, stop - step)):
                state = x[lane]
                entry = table[state & _MASK]
                out[step + lane] = entry >> _SYMBOL
                state = (((entry >> _BITS) & _MASK) + _ONE) * (state >> _BITS) + (entry & _MASK)
                needed = state < _LOWEST
                refilled = (state << _WORD) | uint32(words[position])
                x[lane] = refilled if needed else state
                position += needed
        if position != end:
            return False
        for lane in range(LANES):
            if x[lane] != _LOWEST:
                return False
    return True


def encode_segments(
    symbols: Bytes, tables: EncodingTables, segment: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint16]]:
    """Words of each segment [S], states [S, 32] and words of symbols [n]."""
    segments = -(-symbols.size // segment)
    words_of, states = np.empty(segments, np.uint32), np.empty((segments, LANES), np.uint32)
    words = np.empty(symbols.size, np.uint16)
    start = _encode(read_only(symbols), *tables, words_of, states, words, segment)
    return words_of, states, words[start:]


def decode_stream(stream: RansStream, out: Bytes) -> None:
    """Decode into ``out`` [n].

    Raises:
        ValueError: when the states or words are damaged.
    """
    words = np.concatenate([stream.words, np.zeros(LANES, np.uint16)])
    table = decoding_table(stream.tables)
    if not _decode(table, read_only(stream.words_of), read_only(stream.states), words, out, stream.segment):
        raise ValueError("a rANS stream does not end where it must: its states or words are damaged")
