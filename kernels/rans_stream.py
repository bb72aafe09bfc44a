"""The bitstream of interleaved rANS: one format, and three decoders of it that agree in every bit.

Symbols are cut into segments of 2^b. Symbol i of a segment belongs to lane i mod 32: 32 states take turns, and the
words they need stand in one sequence, in the order of steps and of lanes within a step. A stream of n symbols,
little-endian:

    u8           symbols that occur, less one: K - 1
    u8           b, 10 to 20
    u8 [K]       the symbols, ascending
    u16 [K]      their frequencies, at least 1, sum 4096
    u32 [S]      words of each segment, S = ceil(n / 2^b)
    u32 [S, 32]  states that decoding starts with
    u16 [...]    the words

An encoder starts every state at 2^16 and goes backwards. So after the last symbol all states must be 2^16 again and all
words be used, which finds most damage. n itself is not stored.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from litropy.kernels.rans_tables import TOTAL, AliasTables, alias_tables, decoding_table, frequencies
from litropy.kernels.tensor_codec_layout import SEGMENT, Buffer
from litropy.kernels.tensor_codec_planes import Bytes, count_bytes, numba_loops

__all__ = [
    "LANES",
    "LONG_SEGMENT",
    "LOWEST_STATE",
    "RansBatch",
    "RansStream",
    "batch_streams",
    "encode_rans",
    "lookup_tables",
    "parse_stream",
    "states_bytes",
]

LANES = 32
LOWEST_STATE = 1 << 16
# of what a GPU need not decode: the states of a segment cost less
LONG_SEGMENT = 1 << 17
_SEGMENT_BITS = range(10, 21)


class RansStream(NamedTuple):
    """A stream taken apart."""

    total: int  # symbols
    segment: int  # symbols of a segment
    tables: AliasTables
    words_of: NDArray[np.uint32]  # [S]
    states: NDArray[np.uint32]  # [S, 32]
    words: NDArray[np.uint16]


class RansBatch(NamedTuple):
    """Segments of several streams; symbols of the streams follow each other in the output."""

    total: int  # symbols
    tables: list[AliasTables]
    table_of: NDArray[np.int32]  # [S], which tables a segment needs
    symbols: NDArray[np.int32]  # [S], its symbols
    output: NDArray[np.int64]  # [S], where they start
    words_at: NDArray[np.int64]  # [S], where its words start
    words_of: NDArray[np.int32]  # [S], how many there are
    states: NDArray[np.uint32]  # [S, 32]
    words: NDArray[np.uint16]


def states_bytes(count: int, segment: int) -> int:
    """Bytes of a stream of ``count`` symbols that are neither tables nor information."""
    # a state is written with 32 bits, of which it holds 8 on average when 16 were there to start with
    return 2 + (4 + LANES * (4 - 1)) * -(-count // segment)


def encode_rans(symbols: Bytes, segment: int = SEGMENT, counts: NDArray[np.int64] | None = None) -> bytes:
    """Symbols as a stream.

    Args:
        symbols: [n], n > 0.
        segment: symbols of a segment, a power of two from 2^10 to 2^20.
        counts: how often each byte occurs, [256]; bytes above the last that does are coded as that one.

    Returns:
        The stream.
    """
    counts = count_bytes(symbols) if counts is None else counts
    present = np.flatnonzero(counts).astype(np.uint8)
    frequency = frequencies(counts)[present].astype("<u2")
    if numba_loops() is None:
        from litropy.kernels.rans_numpy import encode_segments
    else:
        from litropy.kernels.rans_numba import encode_segments
    words_of, states, words = encode_segments(symbols, present, frequency, segment)
    head = bytes([len(present) - 1, segment.bit_length() - 1]) + present.tobytes() + frequency.tobytes()
    head += words_of.astype("<u4").tobytes() + states.astype("<u4").tobytes()
    return head + words.astype("<u2", copy=False).tobytes()


def parse_stream(payload: Buffer, count: int) -> RansStream:
    """Take a stream of ``count`` symbols apart and check whatever can be checked without decoding it.

    Raises:
        ValueError: when it is not one; states and words may still be wrong, which decoding finds.
    """
    data = np.frombuffer(payload, np.uint8)
    if data.size < 2 or data[1] not in _SEGMENT_BITS:
        raise ValueError(f"a rANS stream starts with {data[:2].tolist()}: segments have 2^10 to 2^20 symbols")
    alphabet, segment = int(data[0]) + 1, 1 << int(data[1])
    segments = -(-count // segment)
    ends = np.cumsum([2, alphabet, 2 * alphabet, 4 * segments, 4 * LANES * segments])
    if data.size < ends[-1]:
        raise ValueError(f"a rANS stream of {count} symbols has {data.size} bytes, too few for its tables")
    _, symbols, *parts = np.split(data, ends)
    # copied, because they may stand at any address
    frequency, words_of = np.frombuffer(parts[0].tobytes(), "<u2"), np.frombuffer(parts[1].tobytes(), "<u4")
    if (np.diff(symbols.astype(int)) <= 0).any() or (frequency < 1).any() or frequency.sum(dtype=int) != TOTAL:
        raise ValueError("the symbols of a rANS stream do not ascend, or their frequencies do not sum to 4096")
    expected = 2 * int(words_of.sum(dtype=int))
    if expected != parts[3].size:
        raise ValueError(f"a rANS stream has {parts[3].size} bytes of words, but its segments ask for {expected}")
    states = np.frombuffer(parts[2].tobytes(), "<u4").reshape(segments, LANES)
    words = np.frombuffer(parts[3].tobytes(), "<u2")
    return RansStream(count, segment, alias_tables(symbols, frequency), words_of, states, words)


def batch_streams(streams: Sequence[RansStream]) -> RansBatch:
    """Put streams side by side."""
    segments = [len(stream.words_of) for stream in streams]
    symbols = np.concatenate([_symbols_of(stream) for stream in streams])
    words_of = np.concatenate([stream.words_of for stream in streams]).astype(np.int64)
    return RansBatch(
        sum(stream.total for stream in streams),
        [stream.tables for stream in streams],
        np.repeat(np.arange(len(streams), dtype=np.int32), segments),
        symbols.astype(np.int32),
        np.cumsum(symbols) - symbols,
        np.cumsum(words_of) - words_of,
        words_of.astype(np.int32),
        np.concatenate([stream.states for stream in streams]),
        np.concatenate([stream.words for stream in streams]),
    )


def _symbols_of(stream: RansStream) -> NDArray[np.int64]:
    """Symbols of each segment."""
    return np.minimum(stream.segment, stream.total - stream.segment * np.arange(len(stream.words_of)))


def lookup_tables(batch: RansBatch) -> NDArray[np.uint32]:
    """Decoding tables of all streams, [streams, 4096]."""
    return np.stack([decoding_table(tables) for tables in batch.tables])
