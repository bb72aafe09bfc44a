"""Triton kernel for statistics that compare the logits of a row: a program owns a row of stored logits.

A threshold such as the nucleus' is found by bisection over the numbers that a float can be, 32 passes over a row that
lies in the cache: exact, ties included, and without sorting.

Shape key: n rows of a block, V vocabulary.
"""

import triton
import triton.language as tl

from litropy.kernels.linear_head_triton_kernels import _final, _merge

__all__ = ["ranking_kernel"]

# keys of minus and plus infinity, and what turns the bits of a negative float into its key
_LOWEST = tl.constexpr(-2139095041)
_HIGHEST = tl.constexpr(2139095040)
_FLIP = tl.constexpr(0x7FFFFFFF)
_NO_PROBABILITY = tl.constexpr(-1e4)


@triton.jit
def _key(z):
    """The place of a float in the order of all floats: keys and floats grow together."""
    bits = z.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ _FLIP, bits)


@triton.jit
def _float(key):
    """The inverse of ``_key``."""
    return tl.where(key < 0, key ^ _FLIP, key).to(tl.float32, bitcast=True)


@triton.jit
def ranking_kernel(
    logits_ptr, c_ptr, target_ptr, scale_ptr, sums_ptr, argmax_ptr, rank_ptr, top_k_ptr, nucleus_ptr,
    V, stride_logits, stride_field, softcap, inv_temperature, top_k, top_p,
    HAS_C: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_TARGET: tl.constexpr,
    WANT_T: tl.constexpr, WANT_T2: tl.constexpr, WANT_B: tl.constexpr, WANT_BT: tl.constexpr, WANT_R: tl.constexpr,
    WANT_ARGMAX: tl.constexpr, WANT_TOP_K: tl.constexpr, WANT_TOP_P: tl.constexpr, OPEN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Make raw logits [V] of a row final in place; store its sums [8, n], its rank, top-k and nucleus, [., n]."""
    n = tl.program_id(0).to(tl.int64)
    row = logits_ptr + n * stride_logits
    one = tl.arange(0, 1)
    scale = tl.zeros((1,), dtype=tl.float32) + inv_temperature
    if HAS_SCALE:
        scale = tl.load(scale_ptr + n + one)
    target = -1
    if HAS_TARGET:
        target = tl.load(target_ptr + n)
    zero = tl.zeros((1,), dtype=tl.float32)
    m = zero - float("inf")
    s, t, t2, b, bt, r, z_target = zero, zero, zero, zero, zero, zero, zero
    argmax = tl.zeros((1,), dtype=tl.int64)
    seen = 0.0
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z, _ = _final(tl.load(row + v, mask=v < V, other=0.0)[None, :], scale, softcap, HAS_SOFTCAP)
        tl.store((row + v)[None, :], z, mask=(v < V)[None, :])
        z = tl.where((v < V)[None, :], z, -float("inf"))
        if WANT_ARGMAX:
            argmax = tl.where(tl.max(z, 1) > m, tl.argmax(z, 1).to(tl.int64) + start, argmax)
        z_target += tl.sum(tl.where((v == target)[None, :], z, 0.0), 1)
        m, s, t, t2, b, bt, r, seen, _, _ = _merge(
            z, v, V, c_ptr, seen, m, s, t, t2, b, bt, r, WANT_T, WANT_T2, WANT_B, WANT_BT, WANT_R, HAS_C
        )
    at = sums_ptr + n + one
    tl.store(at, m)
    tl.store(at + stride_field, s)
    tl.store(at + 2 * stride_field, t)
    tl.store(at + 3 * stride_field, t2)
    tl.store(at + 4 * stride_field, b)
    tl.store(at + 5 * stride_field, bt)
    tl.store(at + 6 * stride_field, r)
    tl.store(at + 7 * stride_field, z_target)
    if WANT_ARGMAX:
        tl.store(argmax_ptr + n + one, argmax)
    tl.debug_barrier()  # the passes that follow read what other threads of the program wrote

    top, total, z_y = tl.sum(m, 0), tl.sum(s, 0), tl.sum(z_target, 0)
    low_k, high_k, low_p, high_p = _LOWEST, _HIGHEST, _LOWEST, _HIGHEST
    if WANT_TOP_K or WANT_TOP_P:
        for _ in range(32):
            middle_k = (low_k & high_k) + ((low_k ^ high_k) >> 1)
            middle_p = (low_p & high_p) + ((low_p ^ high_p) >> 1)
            count, mass = 0, 0.0
            for start in range(0, V, BLOCK_V):
                v = start + tl.arange(0, BLOCK_V)
                z = tl.load(row + v, mask=v < V, other=-float("inf"))
                key = tl.where(v < V, _key(z), _LOWEST - 1)
                count += tl.sum((key >= middle_k).to(tl.int32), 0)
                mass += tl.sum(tl.where(key >= middle_p, tl.exp(z - top), 0.0), 0)
            low_k, high_k = tl.where(count >= top_k, middle_k, low_k), tl.where(count >= top_k, high_k, middle_k)
            reaches = mass >= top_p * total
            low_p, high_p = tl.where(reaches, middle_p, low_p), tl.where(reaches, high_p, middle_p)
    kth, threshold = _float(low_k), _float(low_p)

    rank, above = 0, 0
    mass_k, moment_k, mass_p, moment_p = 0.0, 0.0, 0.0, 0.0
    lowest, next_one = float("inf"), -float("inf")
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = tl.load(row + v, mask=v < V, other=-float("inf"))
        u = tl.maximum(z - top, _NO_PROBABILITY)
        e = tl.exp(z - top)
        rank += tl.sum(((z > z_y) & (v < V)).to(tl.int32), 0)
        if WANT_TOP_K:
            greater = (z > kth) & (v < V)
            above += tl.sum(greater.to(tl.int32), 0)
            mass_k += tl.sum(tl.where(greater, e, 0.0), 0)
            moment_k += tl.sum(tl.where(greater, u * e, 0.0), 0)
        if WANT_TOP_P:
            inside = (z > threshold) if OPEN else (z >= threshold)
            inside = inside & (v < V)
            mass_p += tl.sum(tl.where(inside, e, 0.0), 0)
            moment_p += tl.sum(tl.where(inside, u * e, 0.0), 0)
            lowest = tl.minimum(lowest, tl.min(tl.where(inside, z, float("inf")), 0))
            next_one = tl.maximum(next_one, tl.max(tl.where(inside, -float("inf"), z), 0))
    tl.store(rank_ptr + n, rank)
    if WANT_TOP_K:
        # of several equal entries at the k-th place, as many as are missing
        missing = (top_k - above).to(tl.float32)
        u = tl.maximum(kth - top, _NO_PROBABILITY)
        mass_k += missing * tl.exp(u)
        moment_k += missing * u * tl.exp(u)
        tl.store(top_k_ptr + n, tl.log(mass_k) - moment_k / mass_k)
        tl.store(top_k_ptr + stride_field + n, mass_k / total)
    if WANT_TOP_P:
        half_way = next_one + (lowest - next_one) / 2
        half_way = tl.where(next_one == -float("inf"), next_one, half_way)
        # two neighbouring floats have nothing between them
        boundary = tl.where((half_way > next_one) | (next_one == -float("inf")), half_way, lowest)
        # an open nucleus may be empty: entropy 0; a row that is not finite stays so
        is_empty = (lowest == float("inf")) & (total == total)
        entropy = tl.log(mass_p) - moment_p / mass_p
        tl.store(nucleus_ptr + n, tl.where(is_empty, 0.0, entropy))
        tl.store(nucleus_ptr + stride_field + n, tl.where(is_empty, float("inf"), boundary))
        tl.store(nucleus_ptr + 2 * stride_field + n, tl.where(is_empty, 0.0, tl.log(mass_p) - tl.log(total)))
