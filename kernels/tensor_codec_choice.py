"""Which coder each byte plane of a tensor gets, from a sample of it.

The smallest is taken, but what is slower must be worth it: a plane is coded at all, searched for matches or given to
rANS only where that saves so many bytes of the tensor.
"""

from collections.abc import Iterator
from heapq import heapify, heappop, heapreplace

import numpy as np
from numpy.typing import NDArray

from litropy.kernels.rans_ceiling import best_ceiling
from litropy.kernels.rans_stream import LONG_SEGMENT, states_bytes
from litropy.kernels.tensor_codec_chunks import zstd_bytes
from litropy.kernels.tensor_codec_groups import GROUP, subtract_offsets
from litropy.kernels.tensor_codec_layout import SEGMENT, Codec, Coder, TensorLayout
from litropy.kernels.tensor_codec_planes import ROTATE, Bytes, count_bytes

__all__ = ["BLOCKS", "FEW_BYTES", "choose_coders", "sample_ranges"]

# tensors up to this size are not worth a choice
FEW_BYTES = 2048
BLOCKS = 4
# elements of a block: a sixteenth of small tensors, so that looking does not take longer than coding
_BLOCK, _LEAST_BLOCK = 8192, 2048
# bits of entropy a byte from which on codes cannot save anything worth their time
_NOISE = 7.96
# where a byte is so likely that Huffman codes, of a bit at least, are too long, and below two bits, matches save more,
# so that is tried
_LEAST_BITS, _MOST_LIKELY = 2.0, 0.4
# bytes above are not coded by our own encoder of Huffman codes
_SYMBOLS = 129
# bytes that a Zstandard frame has without its content, and a table of Huffman codes with its block
_FRAME, _TABLE, _BLOCK_BYTES = 13, 14, 1 << 17
# the least share of a tensor's bytes that a plane's coder must save to be taken: any at all over raw bytes, LZ matches
# over Huffman codes alone, offsets of groups over one scale for all, and rANS over Zstandard
_LEAST_SAVING = {"huffman": 0.002, "zstd": 0.002, "zstd_match": 0.02, "groups": 0.005, "rans": 0.005}
_CANDIDATES: dict[Codec, tuple[Coder, ...]] = {
    "zstd": ("huffman", "zstd", "zstd_match", "groups"),
    "rans": ("rans",),
    "auto": ("huffman", "zstd", "zstd_match", "groups", "rans"),
}


def sample_ranges(layout: TensorLayout) -> Iterator[tuple[int, list[slice]]]:
    """Chunks to look at, and which of their elements: everything where that is little, else evenly spaced blocks."""
    chunks = sorted({layout.num_chunks * i // BLOCKS for i in range(BLOCKS)} if layout.num_chunks else ())
    blocks = -(-BLOCKS // max(len(chunks), 1))
    most = min(max(layout.numel // 64, _LEAST_BLOCK), _BLOCK)
    for index in chunks:
        start, stop = layout.chunk_range(index)
        if stop - start <= blocks * most:
            yield index, [slice(0, stop - start)]
            continue
        gap = (stop - start - most) // max(blocks - 1, 1)
        yield index, [slice(i * gap, i * gap + most) for i in range(blocks)]


def choose_coders(
    planes: Bytes, words: int, chunk: int, codec: Codec, kind: int, delta: bool
) -> tuple[tuple[Coder, ...], int]:
    """Coders of all planes, and how many bytes they are likely to take together.

    Args:
        planes: of the sample, [bytes of a word, n].
        words: of the whole tensor.
        chunk: words of a chunk.
        codec: which coders may be taken.
        kind: transform of the words.
        delta: whether they are differences, which rANS gets in long segments and for less.

    Returns:
        A coder for each plane, and bytes.
    """
    if codec == "auto" and words * len(planes) <= FEW_BYTES:
        coder: Coder = "zstd"
        return (coder,) * len(planes), sum(min(len(zstd_bytes(plane, coder)), plane.size) for plane in planes)
    chunk = min(chunk, words)
    # sequences that occur again are not to be found in floats and differences
    matching = kind != ROTATE and not delta
    least = _LEAST_SAVING | ({"rans": 0.0005} if delta else {})
    chosen: list[Coder] = []
    total = 0.0
    for plane in planes:
        counts = count_bytes(plane)
        p = counts[counts > 0] / plane.size
        # a sample has less entropy than what it is of (Miller and Madow)
        unseen = (len(p) - 1) / (2 * plane.size * np.log(2)) if plane.size < words else 0.0
        entropy = min(unseen - float(p @ np.log2(p)), 8.0)
        best: Coder = "raw"
        sizes = {best: float(words)}
        for coder in _CANDIDATES[codec]:
            worth = least[coder] * words * len(planes)
            if not matching if coder == "zstd_match" else entropy > _NOISE:
                continue
            if coder in ("huffman", "rans") and sizes[best] - entropy / 8 * words <= worth:
                continue
            if coder == "rans":
                size = best_ceiling(counts * (chunk / plane.size))[1] / chunk + unseen / 8
                sizes[coder] = size * words + states_bytes(words, LONG_SEGMENT if delta else SEGMENT)
            elif coder == "huffman":
                if entropy <= _LEAST_BITS or p.max() > _MOST_LIKELY:
                    continue
                if counts[_SYMBOLS:].any():
                    # not by our own encoder
                    sizes[coder] = _frame_bytes(plane, coder, words)
                else:
                    tables = -(-words // _BLOCK_BYTES) * (_TABLE + len(p) / 2)
                    sizes[coder] = (_huffman_bits(counts) + unseen) / 8 * words + tables
            elif coder == "groups":
                # of the exponent alone: elsewhere there is no scale
                if kind != ROTATE or chosen:
                    continue
                offsets, rest = subtract_offsets(plane)
                bits = _huffman_bits(count_bytes(rest)) + (_entropy(offsets) + 1) / GROUP
                sizes[coder] = bits / 8 * words
            elif coder == "zstd" and "huffman" in sizes and not matching:
                continue
            else:
                sizes[coder] = _frame_bytes(plane, coder, words)
            if sizes[best] - sizes[coder] > worth:
                best = coder
        chosen.append(best)
        total += sizes[best]
    return tuple(chosen), round(total)


def _frame_bytes(plane: Bytes, coder: Coder, words: int) -> float:
    """Bytes of a Zstandard frame of so many words, which are like these."""
    return _FRAME + (len(zstd_bytes(plane, coder)) - _FRAME) * words / plane.size


def _huffman_bits(counts: NDArray[np.int64]) -> float:
    """Bits of a byte in Huffman codes."""
    heap = counts[counts > 0].tolist()
    heapify(heap)
    total = 0
    while len(heap) > 1:
        # every byte below a node takes a bit there
        lighter = heappop(heap)
        total += lighter + heap[0]
        heapreplace(heap, lighter + heap[0])
    return total / int(counts.sum())


def _entropy(symbols: Bytes) -> float:
    """Bits of a byte."""
    counts = count_bytes(symbols)
    p = counts[counts > 0] / symbols.size
    return -float(p @ np.log2(p))
