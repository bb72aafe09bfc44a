"""Triton kernel for rANS decoding: a row of 32 lanes, one warp, owns a segment.

The words of a segment stand in one sequence, so a lane that needs a word must know how many lanes before it need one,
too. The lanes' needs are summed up into the bits of one number, of which each lane counts those below its own. Tables
of 32 entries are kept in the registers of the lanes, an entry each, and looked up across them; larger ones stay in
memory, that is, in the first cache.

Shape key: R segments of a program, 32 lanes.
"""

import triton
import triton.language as tl

__all__ = ["rans_decode_kernel"]

_TOTAL = tl.constexpr(4096)
_LOWEST = tl.constexpr(65536)


@triton.jit
def _ones_below(needed, lane):
    """How many of the lanes [R, 32] before each lane are set, and how many in all, [R]."""
    bits = tl.sum(needed.to(tl.int32) << lane[None, :], 1).to(tl.uint32, bitcast=True)
    below = bits[:, None] & ((1 << lane.to(tl.uint32))[None, :] - 1)
    return _ones(below).to(tl.int32), _ones(bits).to(tl.int32)


@triton.jit
def _ones(x):
    """How many bits of a uint32 are set; compilers know the pattern as one instruction."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def rans_decode_kernel(
    divider_ptr, first_ptr, second_ptr, table_ptr, symbols_ptr, output_ptr, words_at_ptr, words_of_ptr, states_ptr,
    words_ptr, decoded_ptr, intact_ptr, segments, steps,
    BUCKETS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Decode segments of at most ``steps`` x 32 symbols; what a damaged one reads stays inside its words."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, 32)
    there = row < segments
    symbols = tl.load(symbols_ptr + row, mask=there, other=0)
    words_of = tl.load(words_of_ptr + row, mask=there, other=0)
    words = words_ptr + tl.load(words_at_ptr + row, mask=there, other=0)
    decoded = decoded_ptr + tl.load(output_ptr + row, mask=there, other=0)[:, None] + lane[None, :]
    table = tl.load(table_ptr + row, mask=there, other=0)[:, None] * BUCKETS
    state = tl.load(states_ptr + row[:, None] * 32 + lane[None, :], mask=there[:, None], other=_LOWEST)
    state = state.to(tl.uint32, bitcast=True)
    if BUCKETS == 32:
        divider = tl.load(divider_ptr + table + lane[None, :])
        first = tl.load(first_ptr + table + lane[None, :])
        second = tl.load(second_ptr + table + lane[None, :])
    position = tl.zeros((ROWS,), dtype=tl.int32)
    capacity: tl.constexpr = _TOTAL // BUCKETS
    for step in range(0, steps):
        active = step * 32 + lane[None, :] < symbols[:, None]
        slot = (state & (_TOTAL - 1)).to(tl.int32)
        bucket, within = slot // capacity, slot % capacity
        if BUCKETS == 32:
            own = within < tl.gather(divider, bucket, 1)
            entry = tl.where(own, tl.gather(first, bucket, 1), tl.gather(second, bucket, 1))
        else:
            own = within < tl.load(divider_ptr + table + bucket)
            entry = tl.load(tl.where(own, first_ptr, second_ptr) + table + bucket)
        entry = entry.to(tl.uint32, bitcast=True)
        tl.store(decoded + step * 32, (entry >> 24).to(tl.uint8), mask=active)
        rank = (entry + within.to(tl.uint32, bitcast=True)) & (_TOTAL - 1)
        grown = (((entry >> 12) & (_TOTAL - 1)) + 1) * (state >> 12) + rank
        needed = active & (grown < _LOWEST)
        before, used = _ones_below(needed, lane)
        at = position[:, None] + before
        word = tl.load(words[:, None] + at, mask=needed & (at < words_of[:, None]), other=0).to(tl.uint32) & 0xFFFF
        state = tl.where(needed, (grown << 16) | word, tl.where(active, grown, state))
        position += used
    wrong = tl.sum((state != _LOWEST).to(tl.int32), 1)
    tl.store(intact_ptr + row, ((wrong == 0) & (position == words_of)).to(tl.uint8), mask=there)
