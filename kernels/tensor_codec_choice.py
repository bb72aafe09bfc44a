"""Which coder each byte plane of a tensor gets, from a sample of it.

The smallest is taken, but what is slower must be worth it: a plane is coded at all, searched for matches or given to
rANS only where that saves so many bytes of the tensor.
"""

from collections.abc import Iterator

import numpy as np

from litropy.kernels.rans_stream import stream_bytes
from litropy.kernels.rans_tables import TOTAL, frequencies
from litropy.kernels.tensor_codec_chunks import zstd_bytes
from litropy.kernels.tensor_codec_layout import Codec, Coder, TensorLayout
from litropy.kernels.tensor_codec_planes import Bytes

__all__ = ["BLOCKS", "choose_coders", "sample_ranges"]

BLOCKS = 4
_BLOCK = 32768
# the least share of a tensor's bytes that a plane's coder must save to be taken: any at all over raw bytes, LZ matches
# over Huffman codes alone, and rANS over Zstandard
_LEAST_SAVING = {"raw": 0.0, "zstd": 0.002, "zstd_match": 0.02, "rans": 0.0025}
_CANDIDATES: dict[Codec, tuple[Coder, ...]] = {
    "zstd": ("raw", "zstd", "zstd_match"),
    "rans": ("raw", "rans"),
    "auto": ("raw", "zstd", "zstd_match", "rans"),
}


def sample_ranges(layout: TensorLayout) -> Iterator[tuple[int, list[slice]]]:
    """Chunks to look at, and which of their elements: everything where that is little, else evenly spaced blocks."""
    chunks = sorted({layout.num_chunks * i // BLOCKS for i in range(BLOCKS)} if layout.num_chunks else ())
    blocks = -(-BLOCKS // max(len(chunks), 1))
    for index in chunks:
        start, stop = layout.chunk_range(index)
        length = min(_BLOCK, -(-(stop - start) // blocks))
        gap = (stop - start - length) // max(blocks - 1, 1)
        yield index, [slice(i * gap, i * gap + length) for i in range(blocks)]


def choose_coders(planes: Bytes, words: int, codec: Codec) -> tuple[tuple[Coder, ...], int]:
    """Coders of all planes, and how many bytes they are likely to take together.

    Args:
        planes: of the sample, [bytes of a word, n].
        words: of the whole tensor.
        codec: which coders may be taken.

    Returns:
        A coder for each plane, and bytes.
    """
    chosen: list[Coder] = []
    total = 0.0
    for plane in planes:
        best: Coder = "raw"
        sizes = {best: float(words)}
        for coder in _CANDIDATES[codec][1:]:
            sizes[coder] = _estimate(plane, words, coder)
            if sizes[best] - sizes[coder] > _LEAST_SAVING[coder] * words * len(planes):
                best = coder
        chosen.append(best)
        total += sizes[best]
    return tuple(chosen), round(total)


def _estimate(plane: Bytes, words: int, coder: Coder) -> float:
    """Bytes that a whole plane is likely to take, judging by a part of it."""
    if coder != "rans":
        return len(zstd_bytes(plane, coder)) * words / plane.size
    counts = np.bincount(plane, minlength=256)
    present = counts > 0
    bits = counts[present] @ np.log2(TOTAL / frequencies(counts)[present]) / plane.size
    return stream_bytes(int(present.sum()), words, float(bits))
