"""Triton kernels that multiply only those tiles of logit gradients that a backward pass keeps.

Which tiles these are is known on the device alone, as lists: for each block of rows its tiles of the vocabulary, and
for each tile of the vocabulary its blocks of rows. A program owns its part of the result: no locks, no atomics.

Shape key: N rows, D width (of weight or low-rank matrix), V vocabulary, B blocks of rows, t tiles of a strip.
"""

import triton
import triton.language as tl

__all__ = ["input_gradient_kernel", "weight_gradient_kernel"]


@triton.jit
def input_gradient_kernel(
    out_ptr, dz_ptr, weight_ptr, list_ptr, count_ptr, N, V, D, first, stride_out, stride_dz, stride_v, stride_w, t,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_W: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``out += dz @ weight`` in float32 over the kept tiles of a strip that begins at column ``first``."""
    block = tl.program_id(0)
    n = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    d = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    column = tl.arange(0, BLOCK_V)
    acc = tl.zeros((BLOCK_N, BLOCK_W), dtype=tl.float32)
    for k in range(tl.load(count_ptr + block)):
        start = (tl.load(list_ptr + block * t + k) * BLOCK_V).to(tl.int64)
        v = first + start + column
        dz = tl.load(dz_ptr + n[:, None] * stride_dz + (start + column)[None, :], mask=(n < N)[:, None], other=0.0)
        w_ptrs = weight_ptr + v[:, None] * stride_v + d[None, :] * stride_w
        w = tl.load(w_ptrs, mask=(v < V)[:, None] & (d < D)[None, :], other=0.0)
        if UPCAST:
            dz, w = dz.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(dz, w, acc, input_precision="ieee")
    out_ptrs = out_ptr + n[:, None] * stride_out + d[None, :]
    mask = (n < N)[:, None] & (d < D)[None, :]
    tl.store(out_ptrs, tl.load(out_ptrs, mask=mask, other=0.0) + acc, mask=mask)


@triton.jit
def weight_gradient_kernel(
    out_ptr, bias_ptr, dz_ptr, input_ptr, list_ptr, count_ptr, order_ptr, bounds_ptr, target_ptr, g_target_ptr,
    N, V, D, first, stride_out, stride_dz, stride_n, stride_d, num_blocks,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TARGET: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``out += dz.T @ input`` and ``bias += dz.sum(0)`` over the kept blocks of rows of a strip's tiles.

    Rows whose target lies in a tile that they do not keep come in the order of their targets, ``order``; those of tile
    j are ``bounds[j]`` to ``bounds[j + 1]``, each with the gradient ``g_target`` of its target's logit.
    """
    tile = tl.program_id(0)
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    v = (first + column).to(tl.int64)
    d = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    acc = tl.zeros((BLOCK_V, BLOCK_W), dtype=tl.float32)
    bias = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for k in range(tl.load(count_ptr + tile)):
        block = tl.load(list_ptr + tile * num_blocks + k)
        n = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        dz = tl.load(dz_ptr + n[None, :] * stride_dz + column[:, None], mask=(n < N)[None, :], other=0.0)
        h_ptrs = input_ptr + n[:, None] * stride_n + d[None, :] * stride_d
        h = tl.load(h_ptrs, mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
        if HAS_BIAS:
            bias += tl.sum(dz.to(tl.float32), 1)
        if UPCAST:
            dz, h = dz.to(tl.float32), h.to(tl.float32)
        acc = tl.dot(dz, h, acc, input_precision="ieee")
    if HAS_TARGET:
        end = tl.load(bounds_ptr + tile + 1)
        for start in range(tl.load(bounds_ptr + tile), end, BLOCK_K):
            at = start + tl.arange(0, BLOCK_K)
            rows = tl.load(order_ptr + at, mask=at < end, other=0).to(tl.int64)
            target = tl.load(target_ptr + rows, mask=at < end, other=-1)
            g = tl.load(g_target_ptr + rows, mask=at < end, other=0.0)
            one_hot = tl.where(v[:, None] == target[None, :], g[None, :], 0.0)
            if HAS_BIAS:
                bias += tl.sum(one_hot, 1)
            target_ptrs = input_ptr + rows[:, None] * stride_n + d[None, :] * stride_d
            states = tl.load(target_ptrs, mask=(at < end)[:, None] & (d < D)[None, :], other=0.0)
            if UPCAST:
                states = states.to(tl.float32)
            acc = tl.dot(one_hot.to(states.dtype), states, acc, input_precision="ieee")
    if HAS_WEIGHT:
        out_ptrs = out_ptr + v[:, None] * stride_out + d[None, :]
        mask = (v < V)[:, None] & (d < D)[None, :]
        total = tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32) + acc
        tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)
    if HAS_BIAS:
        inside = (v < V) & (tl.program_id(1) == 0)
        total = tl.load(bias_ptr + v, mask=inside, other=0.0).to(tl.float32) + bias
        tl.store(bias_ptr + v, total.to(bias_ptr.dtype.element_ty), mask=inside)
