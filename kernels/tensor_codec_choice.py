"""Which coder each byte plane of a tensor gets, from a sample of it.

The smallest is taken, but what is slower must be worth it: a plane is coded at all, searched for matches or given to
rANS only where that saves so many bytes of the tensor.
"""

from collections.abc import Iterator

import numpy as np

from litropy.kernels.rans_stream import LONG_SEGMENT, stream_bytes
from litropy.kernels.rans_tables import TOTAL, frequencies
from litropy.kernels.tensor_codec_chunks import zstd_bytes
from litropy.kernels.tensor_codec_groups import GROUP, subtract_offsets
from litropy.kernels.tensor_codec_layout import SEGMENT, Codec, Coder, TensorLayout
from litropy.kernels.tensor_codec_planes import ROTATE, Bytes, count_bytes

__all__ = ["BLOCKS", "choose_coders", "sample_ranges"]

BLOCKS = 4
# elements of a block: a sixteenth of small tensors, so that looking does not take longer than coding
_BLOCK, _LEAST_BLOCK = 16384, 2048
# bits of entropy a byte from which on codes cannot save anything worth their time
_NOISE = 7.96
# Huffman codes take so many bits a byte more than entropy, unless a byte is so likely that it should have less than one
# bit; then, and below two bits, matches save more, so that is tried
_HUFFMAN_EXCESS, _LEAST_BITS, _MOST_LIKELY = 0.035, 2.0, 0.4
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
        length = min(most, -(-(stop - start) // blocks))
        gap = (stop - start - length) // max(blocks - 1, 1)
        yield index, [slice(i * gap, i * gap + length) for i in range(blocks)]


def choose_coders(planes: Bytes, words: int, codec: Codec, kind: int, delta: bool) -> tuple[tuple[Coder, ...], int]:
    """Coders of all planes, and how many bytes they are likely to take together.

    Args:
        planes: of the sample, [bytes of a word, n].
        words: of the whole tensor.
        codec: which coders may be taken.
        kind: transform of the words.
        delta: whether they are differences, which rANS gets in long segments and for less.

    Returns:
        A coder for each plane, and bytes.
    """
    # sequences that occur again are not to be found in floats and differences
    matching = kind != ROTATE and not delta
    segment = LONG_SEGMENT if delta else SEGMENT
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
            if not matching if coder == "zstd_match" else entropy > _NOISE:
                continue
            if coder == "rans":
                bits = unseen - float(p @ np.log2(frequencies(counts)[counts > 0] / TOTAL))
                sizes[coder] = stream_bytes(len(p), words, bits, segment)
            elif coder == "huffman":
                if entropy <= _LEAST_BITS or p.max() > _MOST_LIKELY:
                    continue
                sizes[coder] = (entropy + _HUFFMAN_EXCESS) / 8 * words
            elif coder == "groups":
                # of the exponent alone: elsewhere there is no scale
                if kind != ROTATE or chosen:
                    continue
                offsets, rest = subtract_offsets(plane)
                bits = max(_entropy(rest), 1.0) + _HUFFMAN_EXCESS + (_entropy(offsets) + 1) / GROUP
                sizes[coder] = bits / 8 * words
            elif coder == "zstd" and "huffman" in sizes and not matching:
                continue
            else:
                sizes[coder] = len(zstd_bytes(plane, coder)) * words / plane.size
            if sizes[best] - sizes[coder] > least[coder] * words * len(planes):
                best = coder
        chosen.append(best)
        total += sizes[best]
    return tuple(chosen), round(total)


def _entropy(symbols: Bytes) -> float:
    """Bits of a byte."""
    counts = count_bytes(symbols)
    p = counts[counts > 0] / symbols.size
    return -float(p @ np.log2(p))
