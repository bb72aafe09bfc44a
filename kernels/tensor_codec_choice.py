"""Which coder each byte plane of a tensor gets, from a sample of it.

The smallest is taken, but what is slower must be worth it: a plane is coded at all, searched for matches or given to
rANS only where that saves so many bytes of the tensor.
"""

from collections.abc import Iterator
from functools import cached_property
from heapq import heapify, heappop, heapreplace
from math import log

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
# more symbols than these, bytes from there on among them, our own encoder of Huffman codes leaves to Zstandard's
_FEW_SYMBOLS, _HIGH = 64, 129
# bytes that a Zstandard frame has without its content, and a table of Huffman codes with its block
_FRAME, _TABLE, _BLOCK_BYTES = 13, 14, 1 << 17
# the least share of a tensor's bytes that a plane's coder must save to be taken: any at all over raw bytes, LZ matches
# over Huffman codes alone, offsets of groups over one scale for all, and rANS over Zstandard
_LEAST_SAVING = {"huffman": 0.002, "zstd": 0.002, "zstd_match": 0.02, "groups": 0.005, "rans": 0.005}
_LEAST_OF_DELTAS = {"rans": 0.001}
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
    candidates, whole = _CANDIDATES[codec], words * len(planes)
    samples = [_Sample(plane, words, min(chunk, words), LONG_SEGMENT if delta else SEGMENT) for plane in planes]
    if codec == "auto" and whole <= FEW_BYTES:
        few: Coder = "zstd"
        return (few,) * len(planes), round(sum(min(sample.frame(few), words) for sample in samples))
    # sequences that occur again are not to be found in floats and differences
    matching = kind != ROTATE and not delta
    least = {coder: share * whole for coder, share in (_LEAST_SAVING | (_LEAST_OF_DELTAS if delta else {})).items()}
    chosen: list[Coder] = []
    total = 0.0
    for sample in samples:
        best: Coder = "raw"
        sizes = {best: float(words)}
        for coder in candidates:
            if not matching if coder == "zstd_match" else sample.entropy > _NOISE:
                continue
            if coder in ("huffman", "rans") and sizes[best] - sample.entropy / 8 * words <= least[coder]:
                continue
            if coder == "rans":
                sizes[coder] = sample.rans
            elif coder == "huffman":
                if sample.entropy <= _LEAST_BITS or sample.likeliest > _MOST_LIKELY:
                    continue
                sizes[coder] = sample.frame(coder) if sample.diverse else sample.huffman
            elif coder == "groups":
                # of the exponent alone: elsewhere there is no scale
                if kind != ROTATE or chosen:
                    continue
                sizes[coder] = sample.groups
            elif coder == "zstd" and "huffman" in sizes and not matching:
                continue
            else:
                sizes[coder] = sample.frame(coder)
            if sizes[best] - sizes[coder] > least[coder]:
                best = coder
        chosen.append(best)
        total += sizes[best]
    return tuple(chosen), round(total)


class _Sample:
    """A plane of a sample, and how many bytes coders are likely to make of the whole plane."""

    def __init__(self, plane: Bytes, words: int, chunk: int, segment: int) -> None:
        self.plane, self.words, self.chunk, self.segment = plane, words, chunk, segment

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        return count_bytes(self.plane)

    @property
    def likeliest(self) -> float:
        """Share of the byte that occurs most."""
        return int(self.counts.max()) / self.plane.size

    @property
    def diverse(self) -> bool:
        """Whether Zstandard's encoder of Huffman codes gets it."""
        return bool(np.count_nonzero(self.counts) > _FEW_SYMBOLS and self.counts[_HIGH:].any())

    @cached_property
    def unseen(self) -> float:
        """Bits of entropy a byte that a sample has less than what it is of (Miller and Madow)."""
        if self.plane.size >= self.words:
            return 0.0
        return (np.count_nonzero(self.counts) - 1) / (2 * self.plane.size * log(2))

    @cached_property
    def entropy(self) -> float:
        return min(_entropy(self.counts) + self.unseen, 8.0)

    @property
    def rans(self) -> float:
        stream = best_ceiling(self.counts * (self.chunk / self.plane.size))[1] / self.chunk
        return (stream + self.unseen / 8) * self.words + states_bytes(self.words, self.segment)

    @property
    def huffman(self) -> float:
        tables = -(-self.words // _BLOCK_BYTES) * (_TABLE + np.count_nonzero(self.counts) / 2)
        return (_huffman_bits(self.counts) + self.unseen) / 8 * self.words + tables

    @property
    def groups(self) -> float:
        offsets, rest = subtract_offsets(self.plane)
        return (_huffman_bits(count_bytes(rest)) + (_entropy(count_bytes(offsets)) + 1) / GROUP) / 8 * self.words

    def frame(self, coder: Coder) -> float:
        """Of a Zstandard frame."""
        return _FRAME + (len(zstd_bytes(self.plane, coder)) - _FRAME) * self.words / self.plane.size


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


def _entropy(counts: NDArray[np.int64]) -> float:
    """Bits of a byte."""
    p = counts[counts > 0] / counts.sum()
    return -float(p @ np.log2(p))
