"""Triton kernels of the linear head: logits live in registers only.

``statistics_kernel`` streams over tiles of the vocabulary with the sums of ``linear_head_torch.py``;
``gradient_kernel`` recomputes a tile and writes its gradient. ``linear_head_triton.py`` launches them.

Shape key: N rows, D width, V vocabulary, S shares of the vocabulary.
"""

import triton
import triton.language as tl

__all__ = ["gradient_kernel", "statistics_kernel"]


@triton.jit
def _tanh(x):
    """Hyperbolic tangent to float32 rounding: a series near 0, where the quotient would cancel."""
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    x2 = x * x
    series = x * (1.0 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * (62.0 / 2835)))))
    return tl.where(a < 0.25, series, tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e))


@triton.jit
def _final_logits(
    input_ptr, weight_ptr, bias_ptr, scale, n, v, N, V, D, stride_n, stride_d, stride_v, stride_w, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_N, BLOCK_V] of final logits in float32, and d final / d raw; columns beyond V are -inf."""
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    input_ptrs = input_ptr + n[:, None] * stride_n + d[None, :] * stride_d
    weight_ptrs = weight_ptr + v[None, :] * stride_v + d[:, None] * stride_w
    for start in range(0, D, BLOCK_D):
        inside = d < D - start
        h = tl.load(input_ptrs, mask=(n < N)[:, None] & inside[None, :], other=0.0)
        w = tl.load(weight_ptrs, mask=(v < V)[None, :] & inside[:, None], other=0.0)
        if UPCAST:
            h, w = h.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(h, w, acc, input_precision="ieee")
        input_ptrs += BLOCK_D * stride_d
        weight_ptrs += BLOCK_D * stride_w
    if HAS_BIAS:
        acc += tl.load(bias_ptr + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    slope = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32) + scale[:, None]
    if HAS_SOFTCAP:
        capped = _tanh(acc / softcap)
        slope = slope * (1.0 - capped * capped)
        acc = capped * softcap
    z = tl.where((v < V)[None, :], acc * scale[:, None], -float("inf"))
    return z, slope


@triton.jit
def statistics_kernel(
    input_ptr, weight_ptr, bias_ptr, target_ptr, scale_ptr,
    m_ptr, s_ptr, t_ptr, r_ptr, z_target_ptr, argmax_ptr,
    N, V, D, tiles_per_share, stride_n, stride_d, stride_v, stride_w, softcap, inv_temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_TARGET: tl.constexpr, HAS_SCALE: tl.constexpr,
    WANT_ENTROPY: tl.constexpr, WANT_MEAN: tl.constexpr, WANT_ARGMAX: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Streaming sums of a block of rows over one share of the vocabulary, each [S, N]."""
    # rows vary fastest, so that programs running together read the same tiles of the weight
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    share = tl.program_id(1)
    scale = tl.zeros((BLOCK_N,), dtype=tl.float32) + inv_temperature
    if HAS_SCALE:
        scale = tl.load(scale_ptr + n, mask=n < N, other=1.0)
    target = tl.full((BLOCK_N,), -1, dtype=tl.int64)
    if HAS_TARGET:
        target = tl.load(target_ptr + n, mask=n < N, other=-1)
    m = tl.full((BLOCK_N,), -float("inf"), dtype=tl.float32)
    s = tl.zeros((BLOCK_N,), dtype=tl.float32)
    t = tl.zeros((BLOCK_N,), dtype=tl.float32)
    r = tl.zeros((BLOCK_N,), dtype=tl.float32)
    z_target = tl.zeros((BLOCK_N,), dtype=tl.float32)
    argmax = tl.zeros((BLOCK_N,), dtype=tl.int64)
    seen = 0.0
    for tile in range(share * tiles_per_share, tl.minimum((share + 1) * tiles_per_share, tl.cdiv(V, BLOCK_V))):
        v = (tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
        z, _ = _final_logits(
            input_ptr, weight_ptr, bias_ptr, scale, n, v, N, V, D, stride_n, stride_d, stride_v, stride_w, softcap,
            HAS_BIAS, HAS_SOFTCAP, BLOCK_N, BLOCK_V, BLOCK_D, UPCAST,
        )  # fmt: skip
        top = tl.max(z, 1)
        if WANT_ARGMAX:
            # strictly greater, so that a tie keeps the lower index
            argmax = tl.where(top > m, tl.argmax(z, 1).to(tl.int64) + tile * BLOCK_V, argmax)
        if HAS_TARGET:
            z_target += tl.sum(tl.where(v[None, :] == target[:, None], z, 0.0), 1)
        m_new = tl.maximum(m, top)
        # rows that have seen only -inf are centred at 0: their sums stay 0 instead of NaN
        centre = tl.where(m_new == -float("inf"), 0.0, m_new)
        shift = tl.where(m == -float("inf"), 0.0, m - centre)
        decay = tl.exp(shift)
        u = z - centre[:, None]
        e = tl.exp(u)
        if WANT_MEAN:
            r += seen * shift + tl.sum(tl.where((v < V)[None, :], u, 0.0), 1)
            seen += tl.minimum(BLOCK_V, V - tile * BLOCK_V) * 1.0
        if WANT_ENTROPY:
            t = (t + s * shift) * decay + tl.sum(tl.where(e == 0.0, 0.0, e * u), 1)
        s = s * decay + tl.sum(e, 1)
        m = m_new
    at = share.to(tl.int64) * N + n
    tl.store(m_ptr + at, m, mask=n < N)
    tl.store(s_ptr + at, s, mask=n < N)
    if HAS_TARGET:
        tl.store(z_target_ptr + at, z_target, mask=n < N)
    if WANT_ENTROPY:
        tl.store(t_ptr + at, t, mask=n < N)
    if WANT_MEAN:
        tl.store(r_ptr + at, r, mask=n < N)
    if WANT_ARGMAX:
        tl.store(argmax_ptr + at, argmax, mask=n < N)


@triton.jit
def gradient_kernel(
    dz_ptr, input_ptr, weight_ptr, bias_ptr, target_ptr, scale_ptr, max_logit_ptr, max_logprob_ptr, entropy_ptr,
    factor_ptr, g_logprob_ptr, g_entropy_ptr, g_mean_ptr,
    N, V, D, first, stride_dz, stride_n, stride_d, stride_v, stride_w, softcap, inv_temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_TARGET: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, HAS_MEAN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradient with respect to raw logits of a strip of columns that begins at ``first``, [N, strip]."""
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
    v = first + column
    scale = tl.zeros((BLOCK_N,), dtype=tl.float32) + inv_temperature
    if HAS_SCALE:
        scale = tl.load(scale_ptr + n, mask=n < N, other=1.0)
    z, slope = _final_logits(
        input_ptr, weight_ptr, bias_ptr, scale, n, v, N, V, D, stride_n, stride_d, stride_v, stride_w, softcap,
        HAS_BIAS, HAS_SOFTCAP, BLOCK_N, BLOCK_V, BLOCK_D, UPCAST,
    )  # fmt: skip
    max_logit = tl.load(max_logit_ptr + n, mask=n < N, other=0.0)
    max_logprob = tl.load(max_logprob_ptr + n, mask=n < N, other=0.0)
    factor = tl.load(factor_ptr + n, mask=n < N, other=0.0)
    target = tl.full((BLOCK_N,), -1, dtype=tl.int64)
    if HAS_TARGET:
        target = tl.load(target_ptr + n, mask=n < N, other=-1)
        # an ignored row has no statistics; -inf makes its probabilities 0
        max_logprob = tl.where(target < 0, -float("inf"), max_logprob)
    logp = (z - max_logit[:, None]) + max_logprob[:, None]
    p = tl.exp(logp)
    dz = p * factor[:, None]
    if HAS_ENTROPY:
        g_entropy = tl.load(g_entropy_ptr + n, mask=n < N, other=0.0)
        entropy = tl.load(entropy_ptr + n, mask=n < N, other=0.0)
        dz -= tl.where(p == 0.0, 0.0, p * g_entropy[:, None] * (logp + entropy[:, None]))
    if HAS_MEAN:
        dz += (tl.load(g_mean_ptr + n, mask=n < N, other=0.0) / V)[:, None]
    if HAS_TARGET:
        g_logprob = tl.load(g_logprob_ptr + n, mask=n < N, other=0.0)
        dz += tl.where(v[None, :] == target[:, None], g_logprob[:, None], 0.0)
    dz = (dz * slope).to(dz_ptr.dtype.element_ty)
    tl.store(dz_ptr + n[:, None] * stride_dz + column[None, :], dz, mask=(n < N)[:, None] & (v < V)[None, :])
