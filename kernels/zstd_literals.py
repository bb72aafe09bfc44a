"""Zstandard frames without matches: Huffman codes of every 128 KiB by themselves.

Bytes such as exponents of weights have few values, and no sequence of them means anything. Zstandard's own encoder
finds some nevertheless, by chance, and looks for them half of its time. Any decoder of Zstandard reads these frames.

    frame    magic, descriptor, window of 128 KiB, u32 content size, blocks
    block    u24 (last, kind, bytes); one byte that is repeated, bytes as they are, or
    coded    u40 (kind, sizes), u8 weights, those in 4 bits each, u16 [3] bytes of streams, 4 streams, no sequences;
             of more than 128 weights u8 tells the bytes that they take as ``zstd_weights``

Reference: RFC 8878, sections 3.1.1 and 4.2.
"""

import threading
from typing import Any

import numpy as np
from numba import njit, types, uint32, uint64
from numba.extending import intrinsic

from litropy.kernels.tensor_codec_planes import Bytes, read_only
from litropy.kernels.zstd_weights import compress_weights

__all__ = ["LEAST_BLOCK", "compress_literals"]

BLOCK = 1 << 17
_MOST_BITS, _SYMBOLS = 11, 256
# weights of so many symbols take 4 bits each, those of more are coded themselves
_PLAIN_WEIGHTS = 128
# so that each of four streams has symbols, and the weights are few beside them
LEAST_BLOCK = 1024
# of so few values a block is coded by a sample of it
_CLOSE = 64
# of more symbols, high ones among them, Zstandard's own encoder makes as much as quickly
_FEW_SYMBOLS = 64
_RAW, _REPEATED, _CODED = 0, 1, 2
# magic; a window and 4 bytes of size; window
_HEAD = np.array([0x28, 0xB5, 0x2F, 0xFD, 0x80, (17 - 10) << 3], np.uint8)
_threads = threading.local()


def compress_literals(plane: Bytes, room: Bytes) -> int:
    """Write a frame of a plane [n], n < 2^32, to ``room``, of at least ``room_bytes(n)``; how many bytes it has.

    None are written where a block holds more than 64 symbols and bytes above 128 among them.

    Example:
        >>> exponents = np.random.default_rng(0).geometric(0.5, 300_000).astype(np.uint8)
        >>> compress_literals(exponents, np.empty(1 << 20, np.uint8)) / len(exponents) < 0.252
        True
    """
    # kept from call to call: fresh memory would take long to clear
    if not hasattr(_threads, "pairs"):
        _threads.pairs = np.empty(1 << 16, np.uint64)
    room[: _HEAD.size] = _HEAD
    room[_HEAD.size : _HEAD.size + 4] = np.array([plane.size], "<u4").view(np.uint8)
    return int(_compress(read_only(plane), _threads.pairs, room, _HEAD.size + 4))


@njit(nogil=True, cache=True, error_model="numpy")
def _compress(symbols: Any, pairs: Any, out: Any, at: int) -> int:
    """Blocks to ``out``; where they end, or 0 for symbols that are too high and too many."""
    counts = np.empty((8, 256), np.uint32)
    bits = np.empty(_SYMBOLS, np.int64)
    codes = np.zeros(256, np.uint64)
    for start in range(0, symbols.size, BLOCK):
        block = symbols[start : start + BLOCK]
        last = 1 if start + BLOCK >= symbols.size else 0
        low, high = block[0], block[0]
        for i in range(block.size):
            low, high = min(low, block[i]), max(high, block[i])
        if low == high:
            at = _number(out, at, last | _REPEATED << 1 | block.size << 3, 3)
            out[at] = low
            at += 1
            continue
        size = block.size
        if size >= LEAST_BLOCK and _code_lengths(_count(block, low, high, counts), bits):
            if high > _PLAIN_WEIGHTS and np.count_nonzero(bits) > _FEW_SYMBOLS:
                return 0
            size = _coded_block(block, bits[: high + 1], codes, pairs, out[at + 3 :])
        if size < block.size:
            at = _number(out, at, last | _CODED << 1 | size << 3, 3) + size
        else:
            at = _number(out, at, last | _RAW << 1 | block.size << 3, 3)
            out[at : at + block.size] = block
            at += block.size
    return at


@njit(nogil=True, cache=True, error_model="numpy")
def _number(out: Any, at: int, value: int, width: int) -> int:
    for i in range(width):
        out[at + i] = (value >> (8 * i)) & 255
    return at + width


@njit(nogil=True, cache=True, error_model="numpy")
def _count(block: Any, low: int, high: int, counts: Any) -> Any:
    """How often each byte occurs, [high + 1], or about that where the bytes lie close together."""
    one = uint32(1)
    step = 8
    # eight tables: equal neighbours need not wait for each other
    counts[:] = 0
    if high - low < _CLOSE:
        # a seventh tells the codes' lengths well enough, a third of few; what it lacks may occur nevertheless. Sevenths
        # and thirds of rows whose length is a power of two are in other columns each time
        step = 56 if block.size > BLOCK // 4 else 24
        counts[0, low : high + 1] = one
    whole = block.size // step * step
    for start in range(0, whole, step):
        eight = block[start : start + 8]
        for k in range(8):
            counts[k, eight[k]] += one
    for i in range(whole, block.size):
        counts[0, block[i]] += one
    total = counts[0, : high + 1].copy()
    for k in range(1, 8):
        other = counts[k, : high + 1]
        for i in range(total.size):
            total[i] += other[i]
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def _code_lengths(count: Any, bits: Any) -> bool:
    """Bits of each symbol's code to ``bits``: Huffman's, 11 at most; False where they would not fill the tree."""
    present = np.flatnonzero(count)
    present = present[np.argsort(count[present])]
    k = present.size
    weight, parent = np.empty(2 * k - 1, np.int64), np.zeros(2 * k - 1, np.int64)
    weight[:k] = count[present]
    leaf, node = 0, k
    for new in range(k, 2 * k - 1):
        weight[new] = 0
        for _ in range(2):
            if leaf < k and (node >= new or weight[leaf] <= weight[node]):
                taken = leaf
                leaf += 1
            else:
                taken = node
                node += 1
            weight[new] += weight[taken]
            parent[taken] = new
    depth = np.zeros(2 * k - 1, np.int64)
    for i in range(2 * k - 3, -1, -1):
        depth[i] = depth[parent[i]] + 1
    bits[:] = 0
    # what is cut off long codes is taken from symbols that lose least by it
    free = 1 << _MOST_BITS
    for i in range(k):
        depth[i] = min(depth[i], _MOST_BITS)
        free -= 1 << (_MOST_BITS - depth[i])
    while free < 0:
        longest = 0
        for i in range(k):
            if depth[i] < _MOST_BITS and (depth[longest] == _MOST_BITS or depth[i] > depth[longest]):
                longest = i
        depth[longest] += 1
        free += 1 << (_MOST_BITS - depth[longest])
    for i in range(k - 1, -1, -1):
        while free and 1 << (_MOST_BITS - depth[i]) <= free:
            free -= 1 << (_MOST_BITS - depth[i])
            depth[i] -= 1
    for i in range(k):
        bits[present[i]] = depth[i]
    return free == 0


@njit(nogil=True, cache=True, error_model="numpy")
def _coded_block(block: Any, bits: Any, codes: Any, pairs: Any, out: Any) -> int:
    """A block's bytes to ``out``; how many."""
    longest = bits.max()
    # codes of a length are consecutive, the longest come first: in the highest bits, and their length in the lowest
    value = 0
    for length in range(longest, 0, -1):
        for symbol in range(bits.size):
            if bits[symbol] == length:
                codes[symbol] = uint64(value << (64 - length) | length)
                value += 1
        value >>= 1
    _pair_codes(bits, codes, pairs)
    # the last symbol's weight follows from the others'
    weights = np.empty(bits.size - 1, np.int64)
    for symbol in range(weights.size):
        weights[symbol] = longest + 1 - bits[symbol] if bits[symbol] else 0
    at = 6
    if weights.size <= _PLAIN_WEIGHTS:
        out[5] = 127 + weights.size
        for symbol in range(0, weights.size, 2):
            out[at] = weights[symbol] << 4 | (weights[symbol + 1] if symbol + 1 < weights.size else 0)
            at += 1
    else:
        out[5] = compress_weights(weights, out[at:])
        at += out[5]
        if at == 6:
            return int(block.size)
    sizes = at
    at += 6
    quarter = (block.size + 3) // 4
    for k in range(4):
        length = _stream(block[k * quarter : (k + 1) * quarter], codes, pairs, out[at:])
        at += length
        if k < 3:
            _number(out, sizes + 2 * k, length, 2)
    # compressed, four streams with sizes of 18 bits
    _number(out, 0, 2 | 3 << 2 | block.size << 4 | (at - 5) << 22, 5)
    out[at] = 0
    return at + 1


@njit(nogil=True, cache=True, error_model="numpy")
def _pair_codes(bits: Any, codes: Any, pairs: Any) -> None:
    """Codes of two neighbours, the second one's before the first one's, by both as one number of 16 bits.

    Few symbols are likely, so that those of the 65,536 entries that are looked up stay in the first cache.
    """
    length = uint64(63)
    present = np.flatnonzero(bits)
    for second in present:
        row = pairs[second << 8 : (second + 1) << 8]
        low = codes[second]
        for first in present:
            high = codes[first]
            row[first] = (((low & ~length) >> (high & length)) | (high & ~length)) + ((low + high) & length)


@intrinsic
def _two_at(typing: Any, array: Any, index: Any) -> Any:
    """Bytes ``index`` and ``index`` + 1 as one number, at any address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        pair, number = context.get_value_type(types.uint16), context.get_value_type(types.uint64)
        place = builder.bitcast(builder.gep(data, [arguments[1]]), pair.as_pointer())
        return builder.zext(builder.load(place, align=1), number)

    return types.uint64(array, types.uint64), generate


@intrinsic
def _put_eight(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """A number to bytes ``index`` to ``index`` + 7, at any address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        number = context.get_value_type(types.uint64)
        place = builder.bitcast(builder.gep(data, [arguments[1]]), number.as_pointer())
        builder.store(arguments[2], place, align=1)
        return context.get_dummy_value()

    return types.void(array, types.uint64, types.uint64), generate


@njit(nogil=True, cache=True, error_model="numpy")
def _stream(symbols: Any, codes: Any, pairs: Any, out: Any) -> int:
    """Codes from the last symbol to the first, and a one at the end; how many bytes. Seven more may be written."""
    one, two, three, four, seven = uint64(1), uint64(2), uint64(3), uint64(4), uint64(7)
    # shifts are by less than 64, which the compiler cannot know
    mask = uint64(63)
    # the highest ``used`` bits are still to be written; what lies below them is of no meaning
    held, used, at = uint64(0), uint64(0), uint64(0)
    i = uint64(symbols.size)
    while i & three:
        i -= one
        code = codes[symbols[i]]
        held = (held >> (code & mask)) | code
        used += code & mask
    _put_eight(out, at, held >> ((uint64(0) - used) & mask))
    at += used >> three
    used &= seven
    # 7 bits at most are held and 44 come; the lowest 8 are lengths
    while i:
        i -= four
        later, former = pairs[_two_at(symbols, i + two)], pairs[_two_at(symbols, i)]
        length = (later & mask) + (former & mask)
        held = (held >> length) | (later >> (former & mask)) | former
        used += length
        _put_eight(out, at, held >> ((uint64(0) - used) & mask))
        at += used >> three
        used &= seven
    held = (held >> one) | (one << mask)
    used += one
    _put_eight(out, at, held >> ((uint64(0) - used) & mask))
    return int(at + ((used + seven) >> three))
