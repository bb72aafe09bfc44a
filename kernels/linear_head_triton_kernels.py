"""Triton kernels of the linear head over tiles of logits, which live in registers only.

``statistics_kernel`` streams over tiles of the vocabulary with the sums of ``linear_head_sums.py``;
``gradient_kernel`` recomputes a tile and writes its gradient; ``block_kernel`` takes whole rows of stored logits and
turns them into their gradient in place. ``linear_head_triton.py`` launches them.

Shape key: N rows, D width, R width of a low-rank addition, V vocabulary, S shares of it, T tiles of it.
"""

import triton
import triton.language as tl

from litropy.kernels.tanh_kernels import tanh

__all__ = ["block_kernel", "gradient_kernel", "statistics_kernel"]

# exp of this is 0; in place of -inf, whose product with that 0 would be NaN
_NO_PROBABILITY = tl.constexpr(-1e4)


@triton.jit
def _add_product(
    acc, a, b, first_n, first_v, n, v, N, V, K, a_column, stride_n, stride_d, stride_v, stride_w,
    BLOCK_D: tl.constexpr, UPCAST: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """``acc += a[n, a_column : a_column + K] @ b[v, :K].T``; a and b are tensor descriptors if TMA, else pointers."""
    if TMA:
        for start in range(0, K, BLOCK_D):
            h = a.load([first_n, a_column + start])
            w = b.load([first_v, start])
            if UPCAST:
                h, w = h.to(tl.float32), w.to(tl.float32)
            acc = tl.dot(h, w.T, acc, input_precision="ieee")
    else:
        d = tl.arange(0, BLOCK_D)
        a_ptrs = a + n[:, None] * stride_n + (a_column + d)[None, :] * stride_d
        b_ptrs = b + v[None, :] * stride_v + d[:, None] * stride_w
        for start in range(0, K, BLOCK_D):
            inside = d < K - start
            h = tl.load(a_ptrs, mask=(n < N)[:, None] & inside[None, :], other=0.0)
            w = tl.load(b_ptrs, mask=(v < V)[None, :] & inside[:, None], other=0.0)
            if UPCAST:
                h, w = h.to(tl.float32), w.to(tl.float32)
            acc = tl.dot(h, w, acc, input_precision="ieee")
            a_ptrs += BLOCK_D * stride_d
            b_ptrs += BLOCK_D * stride_w
    return acc


@triton.jit
def _final(z, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Final logits [n, v] of raw ones with the inverse temperatures ``scale`` [n], and d final / d raw."""
    slope = tl.zeros_like(z) + scale[:, None]
    if HAS_SOFTCAP:
        capped = tanh(z / softcap)
        slope = slope * (1.0 - capped * capped)
        z = capped * softcap
    return z * scale[:, None], slope


@triton.jit
def _final_logits(
    input, weight, bias_ptr, low_rank, scale, first_n, first_v, n, v, N, V, width, D, R,
    stride_n, stride_d, stride_v, stride_w, stride_low_rank, softcap,
    HAS_BIAS: tl.constexpr, HAS_LOW_RANK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_N, BLOCK_V] of final logits in float32, and d final / d raw; columns beyond V are -inf.

    ``width`` is D, or 0 to leave the product with the weight out.
    """
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    acc = _add_product(
        acc, input, weight, first_n, first_v, n, v, N, V, width, 0,
        stride_n, stride_d, stride_v, stride_w, BLOCK_D, UPCAST, TMA,
    )  # fmt: skip
    if HAS_LOW_RANK:
        acc = _add_product(
            acc, input, low_rank, first_n, first_v, n, v, N, V, R, D,
            stride_n, stride_d, stride_low_rank, 1, BLOCK_D, UPCAST, TMA,
        )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    z, slope = _final(acc, scale, softcap, HAS_SOFTCAP)
    return tl.where((v < V)[None, :], z, -float("inf")), slope


@triton.jit
def _merge(
    z, v, V, c_ptr, seen, m, s, t, t2, b, bt, r,
    WANT_T: tl.constexpr, WANT_T2: tl.constexpr, WANT_B: tl.constexpr, WANT_BT: tl.constexpr, WANT_R: tl.constexpr,
    HAS_C: tl.constexpr,
):  # fmt: skip
    """Merge final logits z [n, v] into the sums [n]; returns the sums, the mass of the tile, and its centre."""
    m_new = tl.maximum(m, tl.max(z, 1))
    # rows that have seen only -inf are centred at 0: their sums stay 0 instead of NaN
    centre = tl.where(m_new == -float("inf"), 0.0, m_new)
    shift = tl.where(m == -float("inf"), 0.0, m - centre)
    decay = tl.exp(shift)
    u = z - centre[:, None]
    e = tl.exp(u)
    mass = tl.sum(e, 1)
    if WANT_R:
        if HAS_C:  # an entry of weight 0 does not count, even where it has no probability
            c = tl.load(c_ptr + v, mask=v < V, other=0.0)
            r += seen * shift + tl.sum(tl.where((c != 0.0)[None, :], u * c[None, :], 0.0), 1)
            seen += tl.sum(c, 0)
        else:
            r += seen * shift + tl.sum(tl.where((v < V)[None, :], u, 0.0), 1) / V
            seen += tl.sum(tl.where(v < V, 1.0, 0.0), 0) / V
    if WANT_T:
        u = tl.maximum(u, _NO_PROBABILITY)
        moment = tl.sum(u * e, 1)
        t = decay * (t + shift * s)
        if WANT_T2:
            # central: a difference of raw moments would lose digits
            before = decay * s
            mean = tl.where(mass == 0.0, 0.0, moment / mass)
            distance = tl.where((before == 0.0) | (mass == 0.0), 0.0, mean - t / before)
            t2 = decay * t2 + tl.sum((u - mean[:, None]) * (u - mean[:, None]) * e, 1)
            t2 += distance * distance * tl.where(before == 0.0, 0.0, before * (mass / (before + mass)))
        t += moment
    if WANT_BT:
        bt = decay * decay * (bt + shift * b) + tl.sum(u * e * e, 1)
    if WANT_B:
        b = decay * decay * b + tl.sum(e * e, 1)
    return m_new, s * decay + mass, t, t2, b, bt, r, seen, mass, centre


@triton.jit
def statistics_kernel(
    input, weight, bias_ptr, low_rank, c_ptr, target_ptr, scale_ptr, sums_ptr, argmax_ptr, mass_ptr,
    N, V, D, R, tiles_per_share, stride_n, stride_d, stride_v, stride_w, stride_low_rank, stride_field, stride_mass,
    softcap, inv_temperature,
    HAS_BIAS: tl.constexpr, HAS_LOW_RANK: tl.constexpr, HAS_C: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_TARGET: tl.constexpr, HAS_SCALE: tl.constexpr, WANT_T: tl.constexpr, WANT_T2: tl.constexpr,
    WANT_B: tl.constexpr, WANT_BT: tl.constexpr, WANT_R: tl.constexpr, WANT_ARGMAX: tl.constexpr,
    WANT_MASS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Streaming sums of a block of rows over one share of it: m, s, t, t2, b, bt, r, z_target, [8, S, N]."""
    # rows vary fastest, so that programs running together read the same tiles of the weight
    first_n = tl.program_id(0) * BLOCK_N
    n = (first_n + tl.arange(0, BLOCK_N)).to(tl.int64)
    share = tl.program_id(1)
    scale = tl.zeros((BLOCK_N,), dtype=tl.float32) + inv_temperature
    if HAS_SCALE:
        scale = tl.load(scale_ptr + n, mask=n < N, other=1.0)
    target = tl.full((BLOCK_N,), -1, dtype=tl.int64)
    if HAS_TARGET:
        target = tl.load(target_ptr + n, mask=n < N, other=-1)
    zero = tl.zeros((BLOCK_N,), dtype=tl.float32)
    m = zero - float("inf")
    s, t, t2, b, bt, r, z_target = zero, zero, zero, zero, zero, zero, zero
    argmax = tl.zeros((BLOCK_N,), dtype=tl.int64)
    seen = 0.0
    end = tl.minimum((share + 1) * tiles_per_share, tl.cdiv(V, BLOCK_V))
    if HAS_TARGET:  # a block in which every row is ignored has nothing to sum up
        end = tl.where(tl.max(target, 0) < 0, 0, end)
    for tile in range(share * tiles_per_share, end):
        v = (tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
        z, _ = _final_logits(
            input, weight, bias_ptr, low_rank, scale, first_n, tile * BLOCK_V, n, v, N, V, D, D, R,
            stride_n, stride_d, stride_v, stride_w, stride_low_rank, softcap,
            HAS_BIAS, HAS_LOW_RANK, HAS_SOFTCAP, BLOCK_N, BLOCK_V, BLOCK_D, UPCAST, TMA,
        )  # fmt: skip
        if WANT_ARGMAX:
            # strictly greater, so that a tie keeps the lower index
            argmax = tl.where(tl.max(z, 1) > m, tl.argmax(z, 1).to(tl.int64) + tile * BLOCK_V, argmax)
        if HAS_TARGET:
            z_target += tl.sum(tl.where(v[None, :] == target[:, None], z, 0.0), 1)
        m, s, t, t2, b, bt, r, seen, mass, centre = _merge(
            z, v, V, c_ptr, seen, m, s, t, t2, b, bt, r, WANT_T, WANT_T2, WANT_B, WANT_BT, WANT_R, HAS_C
        )
        if WANT_MASS:
            tl.store(mass_ptr + n * stride_mass + tile, tl.log(mass) + centre, mask=n < N)
    at = sums_ptr + share.to(tl.int64) * N + n
    tl.store(at, m, mask=n < N)
    tl.store(at + stride_field, s, mask=n < N)
    if WANT_T:
        tl.store(at + 2 * stride_field, t, mask=n < N)
    if WANT_T2:
        tl.store(at + 3 * stride_field, t2, mask=n < N)
    if WANT_B:
        tl.store(at + 4 * stride_field, b, mask=n < N)
    if WANT_BT:
        tl.store(at + 5 * stride_field, bt, mask=n < N)
    if WANT_R:
        tl.store(at + 6 * stride_field, r, mask=n < N)
    if HAS_TARGET:
        tl.store(at + 7 * stride_field, z_target, mask=n < N)
    if WANT_ARGMAX:
        tl.store(argmax_ptr + share.to(tl.int64) * N + n, argmax, mask=n < N)


@triton.jit
def _gradient_tile(
    row_block, column_block,
    dz_ptr, input, weight, bias_ptr, low_rank, c_ptr, target_ptr, scale_ptr, max_logit_ptr, max_logprob_ptr,
    entropy_ptr, varentropy_ptr, boundary_ptr, nucleus_entropy_ptr, nucleus_log_mass_ptr,
    factor_ptr, g_logprob_ptr, g_entropy_ptr, g_mean_ptr, g_varentropy_ptr, g_nucleus_ptr,
    N, V, D, R, first, stride_dz, stride_n, stride_d, stride_v, stride_w, stride_low_rank,
    softcap, inv_temperature,
    HAS_BIAS: tl.constexpr, HAS_LOW_RANK: tl.constexpr, HAS_C: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_TARGET: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    HAS_MEAN: tl.constexpr, HAS_VARENTROPY: tl.constexpr, HAS_NUCLEUS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile of ``gradient_kernel``."""
    first_n, first_v = row_block * BLOCK_N, first + column_block * BLOCK_V
    n = (first_n + tl.arange(0, BLOCK_N)).to(tl.int64)
    column = (column_block * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
    v = first + column
    width = D
    target = tl.full((BLOCK_N,), -1, dtype=tl.int64)
    if HAS_TARGET:
        target = tl.load(target_ptr + n, mask=n < N, other=-1)
        # a block in which every row is ignored gets zeros without a product
        width = tl.where(tl.max(target, 0) < 0, 0, D)
    scale = tl.zeros((BLOCK_N,), dtype=tl.float32) + inv_temperature
    if HAS_SCALE:
        scale = tl.load(scale_ptr + n, mask=n < N, other=1.0)
    z, slope = _final_logits(
        input, weight, bias_ptr, low_rank, scale, first_n, first_v, n, v, N, V, width, D, R,
        stride_n, stride_d, stride_v, stride_w, stride_low_rank, softcap,
        HAS_BIAS, HAS_LOW_RANK, HAS_SOFTCAP, BLOCK_N, BLOCK_V, BLOCK_D, UPCAST, TMA,
    )  # fmt: skip
    max_logit = tl.load(max_logit_ptr + n, mask=n < N, other=0.0)
    max_logprob = tl.load(max_logprob_ptr + n, mask=n < N, other=0.0)
    factor = tl.load(factor_ptr + n, mask=n < N, other=0.0)
    if HAS_TARGET:
        # an ignored row has no statistics; -inf makes its probabilities 0
        max_logprob = tl.where(target < 0, -float("inf"), max_logprob)
    logp = (z - max_logit[:, None]) + max_logprob[:, None]
    p = tl.exp(logp)
    dz = tl.zeros_like(p) + factor[:, None]
    if HAS_ENTROPY or HAS_VARENTROPY:
        entropy = tl.load(entropy_ptr + n, mask=n < N, other=0.0)
        x = tl.maximum(logp, _NO_PROBABILITY) + entropy[:, None]
        if HAS_ENTROPY:
            dz -= tl.load(g_entropy_ptr + n, mask=n < N, other=0.0)[:, None] * x
        if HAS_VARENTROPY:
            varentropy = tl.load(varentropy_ptr + n, mask=n < N, other=0.0)
            g_varentropy = tl.load(g_varentropy_ptr + n, mask=n < N, other=0.0)
            dz += g_varentropy[:, None] * (x * (x + 2.0) - varentropy[:, None])
    dz = dz * p
    if HAS_NUCLEUS:
        log_q = logp - tl.load(nucleus_log_mass_ptr + n, mask=n < N, other=0.0)[:, None]
        log_q = tl.maximum(log_q, _NO_PROBABILITY)
        inside = z >= tl.load(boundary_ptr + n, mask=n < N, other=float("inf"))[:, None]
        nucleus_entropy = tl.load(nucleus_entropy_ptr + n, mask=n < N, other=0.0)
        g_nucleus = tl.load(g_nucleus_ptr + n, mask=n < N, other=0.0)
        dz -= tl.where(inside, g_nucleus[:, None] * tl.exp(log_q) * (log_q + nucleus_entropy[:, None]), 0.0)
    if HAS_MEAN:
        g_mean = tl.load(g_mean_ptr + n, mask=n < N, other=0.0)
        if HAS_C:
            dz += g_mean[:, None] * tl.load(c_ptr + v, mask=v < V, other=0.0)[None, :]
        else:
            dz += (g_mean / V)[:, None]
    if HAS_TARGET:
        g_logprob = tl.load(g_logprob_ptr + n, mask=n < N, other=0.0)
        dz += tl.where(v[None, :] == target[:, None], g_logprob[:, None], 0.0)
    # zeros beyond the vocabulary: a product over whole tiles may read them
    dz = tl.where((v < V)[None, :], dz * slope, 0.0).to(dz_ptr.dtype.element_ty)
    tl.store(
        dz_ptr + n[:, None] * stride_dz + column[None, :], dz, mask=(n < N)[:, None] & (column < stride_dz)[None, :]
    )


@triton.jit
def gradient_kernel(
    dz_ptr, input, weight, bias_ptr, low_rank, c_ptr, target_ptr, scale_ptr, kept_ptr, max_logit_ptr, max_logprob_ptr,
    entropy_ptr, varentropy_ptr, boundary_ptr, nucleus_entropy_ptr, nucleus_log_mass_ptr,
    factor_ptr, g_logprob_ptr, g_entropy_ptr, g_mean_ptr, g_varentropy_ptr, g_nucleus_ptr,
    N, V, D, R, first, column_blocks, stride_dz, stride_n, stride_d, stride_v, stride_w, stride_low_rank, stride_kept,
    softcap, inv_temperature,
    HAS_BIAS: tl.constexpr, HAS_LOW_RANK: tl.constexpr, HAS_C: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_TARGET: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_KEPT: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    HAS_MEAN: tl.constexpr, HAS_VARENTROPY: tl.constexpr, HAS_NUCLEUS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradient with respect to raw logits of a strip of columns that begins at ``first``, [N, strip].

    A program owns a tile, or if PERSISTENT goes through several, any number of programs through all of them. Rows vary
    fastest, so that those running together read the same tiles of the weight.
    """
    row_blocks, turns = tl.cdiv(N, BLOCK_N), 1
    if PERSISTENT:
        turns = tl.cdiv(row_blocks * column_blocks - tl.program_id(0), tl.num_programs(0))
    for turn in range(turns):
        tile = tl.program_id(0) + turn * tl.num_programs(0)
        row_block, column_block = tile % row_blocks, tile // row_blocks
        is_kept = True
        if HAS_KEPT:
            is_kept = tl.load(kept_ptr + row_block * stride_kept + column_block) != 0
        if is_kept:
            _gradient_tile(
                row_block, column_block,
                dz_ptr, input, weight, bias_ptr, low_rank, c_ptr, target_ptr, scale_ptr, max_logit_ptr, max_logprob_ptr,
                entropy_ptr, varentropy_ptr, boundary_ptr, nucleus_entropy_ptr, nucleus_log_mass_ptr,
                factor_ptr, g_logprob_ptr, g_entropy_ptr, g_mean_ptr, g_varentropy_ptr, g_nucleus_ptr,
                N, V, D, R, first, stride_dz, stride_n, stride_d, stride_v, stride_w, stride_low_rank,
                softcap, inv_temperature,
                HAS_BIAS, HAS_LOW_RANK, HAS_C, HAS_SOFTCAP,
                HAS_TARGET, HAS_SCALE, HAS_ENTROPY,
                HAS_MEAN, HAS_VARENTROPY, HAS_NUCLEUS,
                BLOCK_N, BLOCK_V, BLOCK_D, UPCAST, TMA,
            )  # fmt: skip


@triton.jit
def block_kernel(
    logits_ptr, c_ptr, target_ptr, scale_ptr, row_weight_ptr, nll_weight_ptr, mean_total_ptr, sums_ptr, argmax_ptr,
    V, stride_logits, stride_field, softcap, inv_temperature, label_smoothing, z_loss,
    HAS_C: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_NLL_WEIGHT: tl.constexpr,
    HAS_MEAN_TOTAL: tl.constexpr,
    WANT_T: tl.constexpr, WANT_T2: tl.constexpr, WANT_B: tl.constexpr, WANT_BT: tl.constexpr,
    WANT_R: tl.constexpr, WANT_ARGMAX: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Turn a row of raw logits [V] into the gradient of its loss in place, and store its sums, [8, N]."""
    n = tl.program_id(0).to(tl.int64)
    row = logits_ptr + n * stride_logits
    scale = tl.zeros((1,), dtype=tl.float32) + inv_temperature
    if HAS_SCALE:
        scale = tl.load(scale_ptr + n + tl.arange(0, 1))
    target = tl.load(target_ptr + n)
    zero = tl.zeros((1,), dtype=tl.float32)
    m = zero - float("inf")
    s, t, t2, b, bt, r, z_target = zero, zero, zero, zero, zero, zero, zero
    argmax = tl.zeros((1,), dtype=tl.int64)
    seen = 0.0
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        raw = tl.load(row + v, mask=v < V, other=0.0).to(tl.float32)
        z, _ = _final(raw[None, :], scale, softcap, HAS_SOFTCAP)
        z = tl.where((v < V)[None, :], z, -float("inf"))
        if WANT_ARGMAX:
            argmax = tl.where(tl.max(z, 1) > m, tl.argmax(z, 1).to(tl.int64) + start, argmax)
        z_target += tl.sum(tl.where((v == target)[None, :], z, 0.0), 1)
        m, s, t, t2, b, bt, r, seen, _, _ = _merge(
            z, v, V, c_ptr, seen, m, s, t, t2, b, bt, r, WANT_T, WANT_T2, WANT_B, WANT_BT, WANT_R, HAS_C
        )
    at = sums_ptr + n + tl.arange(0, 1)
    tl.store(at, m)
    tl.store(at + stride_field, s)
    tl.store(at + 2 * stride_field, t)
    tl.store(at + 3 * stride_field, t2)
    tl.store(at + 4 * stride_field, b)
    tl.store(at + 5 * stride_field, bt)
    tl.store(at + 6 * stride_field, r)
    tl.store(at + 7 * stride_field, z_target)
    if WANT_ARGMAX:
        tl.store(argmax_ptr + n + tl.arange(0, 1), argmax)
    # an ignored row has the weight 0, whatever its logits are
    weight = tl.load(row_weight_ptr + n)
    g_logprob = (label_smoothing - 1.0) * weight
    if HAS_NLL_WEIGHT:
        g_logprob = g_logprob * tl.load(nll_weight_ptr + n)
    g_mean = -label_smoothing * weight
    log_s = tl.log(s)
    mean_total = 1.0
    if HAS_MEAN_TOTAL:
        mean_total = tl.load(mean_total_ptr)
    factor = 2.0 * z_loss * weight * (m + log_s) - g_logprob - g_mean * mean_total
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        raw = tl.load(row + v, mask=v < V, other=0.0).to(tl.float32)
        z, slope = _final(raw[None, :], scale, softcap, HAS_SOFTCAP)
        dz = tl.exp((z - m[:, None]) - log_s[:, None]) * factor[:, None]
        if WANT_R:
            if HAS_C:
                dz += g_mean * tl.load(c_ptr + v, mask=v < V, other=0.0)[None, :]
            else:
                dz += g_mean / V
        dz += tl.where((v == target)[None, :], g_logprob, 0.0)
        dz = tl.where(target < 0, 0.0, dz * slope)
        tl.store((row + v)[None, :], dz.to(logits_ptr.dtype.element_ty), mask=(v < V)[None, :])
