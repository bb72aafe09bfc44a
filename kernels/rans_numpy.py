"""rANS encoding in NumPy, over all segments and lanes at once.

What the compiled encoder is held to, and what stands in for it where Numba is not installed.
"""

import numpy as np
from numpy.typing import NDArray

from litropy.kernels.rans_stream import LANES, LOWEST_STATE
from litropy.kernels.rans_tables import PRECISION, encoding_tables
from litropy.kernels.tensor_codec_planes import Bytes

__all__ = ["encode_segments"]


def encode_segments(
    symbols: Bytes, present: Bytes, frequency: NDArray[np.uint16], segment: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint16]]:
    """Words of each segment [S], states [S, 32] and words of symbols [n]; those above all present count as the last."""
    tables = encoding_tables(present, frequency)
    segments = -(-symbols.size // segment)
    padded = np.zeros(segments * segment, np.uint8)
    padded[: symbols.size] = np.minimum(symbols, present[-1])
    steps = padded.reshape(segments, segment // LANES, LANES)
    there = (np.arange(padded.size) < symbols.size).reshape(steps.shape)
    state = np.full((segments, LANES), LOWEST_STATE, np.uint32)
    words, written = np.zeros(steps.shape, np.uint16), np.zeros(steps.shape, bool)
    for step in range(steps.shape[1] - 1, -1, -1):
        symbol, active = steps[:, step], there[:, step]
        # an idle lane gets a frequency of 1 so that nothing divides by 0; its state is not used
        f = np.where(active, tables.frequency[symbol], 1).astype(np.uint32)
        full = active & (state >> (32 - PRECISION) >= f)
        words[:, step], written[:, step] = state & 0xFFFF, full
        shrunk = np.where(full, state >> 16, state)
        quotient, rank = np.divmod(shrunk, f)
        slot = tables.slot[(tables.start[symbol] + rank) % len(tables.slot)]
        state = np.where(active, (quotient << PRECISION) | slot, state)
    return written.sum((1, 2)).astype(np.uint32), state, words[written]
