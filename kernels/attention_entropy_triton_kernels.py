# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of attention entropy over tiles of logits, which live in registers only.

``attention_statistics_kernel`` streams over the keys with the sums of ``attention_entropy_sums.py``;
``attention_gradient_kernel`` recomputes a tile and writes its gradient. ``attention_entropy_triton.py`` launches them.

Shape key: B batch, H query heads, G query heads that share a key head, R selected rows, Tq and Tk positions, D width,
S shares of the keys; r and j are the rows and keys of a tile.
"""

import triton
import triton.language as tl

from litropy.kernels.tanh_kernels import tanh

__all__ = ["attention_gradient_kernel", "attention_statistics_kernel"]

# exp of this is 0; in place of -inf, whose product with that 0 would be NaN
_NO_PROBABILITY = tl.constexpr(-1e4)


@triton.jit
def _rows(
    rows_ptr, prefix_ptr, r, b, R, Tq, Tk, stride_rows_b, stride_rows_r, stride_prefix, window,
    HAS_ROWS: tl.constexpr, HAS_PREFIX: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Which queries a block of rows are, their positions, the prefix, and which range of keys any of them may see."""
    index = r
    if HAS_ROWS:
        index = tl.load(rows_ptr + b * stride_rows_b + r * stride_rows_r, mask=r < R, other=0)
    position = (index + (Tk - Tq)).to(tl.int32)
    least = tl.min(tl.where(r < R, position, Tk), 0)
    most = tl.max(tl.where(r < R, position, -1), 0)
    start, stop, prefix = 0, Tk, 0
    if CAUSAL:
        stop = tl.minimum(stop, most + 1)
    if HAS_WINDOW:
        start = tl.maximum(start, least - window + 1)
        stop = tl.minimum(stop, most + window)
    if HAS_PREFIX:
        prefix = tl.load(prefix_ptr + b * stride_prefix).to(tl.int32)
        if prefix > 0:
            start = 0
        stop = tl.maximum(stop, tl.minimum(prefix, Tk))
    return index, position, prefix, start, stop


@triton.jit
def _tile(
    q_ptr, k_ptr, segments_ptr, key_segments_ptr, key_mask_ptr, mask_ptr, bias_ptr, first_r, first_j, index, position,
    b, h, slope, prefix, R, Tk, G,
    stride_qb, stride_qh, stride_qr, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_segments_b, stride_segments_t, stride_key_segments_b, stride_key_segments_t, stride_key_mask_b,
    stride_key_mask_t, stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, scale, softcap, window, hiding_bias,
    HAS_PREFIX: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_R, BLOCK_T] in float32: raw logits, final logits, d final / d raw, and which keys are visible."""
    raw = tl.zeros((BLOCK_R, BLOCK_T), dtype=tl.float32)
    # 64-bit offsets are scalars; those within a tile fit 32 bits
    q_ptr += b * stride_qb + h * stride_qh + first_r * stride_qr
    k_ptr += b * stride_kb + (h // G) * stride_kh + first_j * stride_kt
    in_block, in_tile, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    for start in tl.static_range(0, WIDTH, BLOCK_D):
        inside = start + d < WIDTH
        q_ptrs = q_ptr + in_block[:, None] * stride_qr + (start + d)[None, :] * stride_qd
        k_ptrs = k_ptr + in_tile[None, :] * stride_kt + (start + d)[:, None] * stride_kd
        q = tl.load(q_ptrs, mask=(in_block < R - first_r)[:, None] & inside[None, :], other=0.0)
        k = tl.load(k_ptrs, mask=(in_tile < Tk - first_j)[None, :] & inside[:, None], other=0.0)
        if UPCAST:
            q, k = q.to(tl.float32), k.to(tl.float32)
        raw = tl.dot(q, k, raw, input_precision="ieee")
    raw *= scale
    z, slope_of_z = raw, tl.zeros_like(raw) + 1.0
    if HAS_SOFTCAP:
        capped = tanh(raw / softcap)
        slope_of_z = 1.0 - capped * capped
        z = capped * softcap
    r, key = first_r.to(tl.int32) + in_block, first_j.to(tl.int32) + in_tile
    exists = (r < R)[:, None] & (key < Tk)[None, :]
    visible = exists
    if CAUSAL:
        visible = visible & (key[None, :] <= position[:, None])
    if HAS_WINDOW:
        visible = visible & (key[None, :] > position[:, None] - window) & (key[None, :] < position[:, None] + window)
    if HAS_PREFIX:
        visible = visible | (exists & (key < prefix)[None, :])
    if HAS_SEGMENTS:
        mine = tl.load(segments_ptr + b * stride_segments_b + index * stride_segments_t, mask=r < R, other=0)
        theirs = tl.load(
            key_segments_ptr + b * stride_key_segments_b + key * stride_key_segments_t, mask=key < Tk, other=0
        )
        visible = visible & (mine[:, None] == theirs[None, :])
    if HAS_KEY_MASK:
        seen = tl.load(key_mask_ptr + b * stride_key_mask_b + key * stride_key_mask_t, mask=key < Tk, other=0)
        visible = visible & (seen != 0)[None, :]
    if HAS_MASK:
        mask_ptr += b * stride_mask_b + h * stride_mask_h + first_j * stride_mask_k
        at = mask_ptr + (index * stride_mask_q)[:, None] + (in_tile * stride_mask_k)[None, :]
        visible = visible & (tl.load(at, mask=exists, other=0) != 0)
    if HAS_BIAS:
        bias_ptr += b * stride_bias_b + h * stride_bias_h + first_j * stride_bias_k
        at = bias_ptr + (index * stride_bias_q)[:, None] + (in_tile * stride_bias_k)[None, :]
        bias = tl.load(at, mask=exists, other=0.0).to(tl.float32)
        visible = visible & ((bias > hiding_bias) | (bias != bias))
        z += bias
    if HAS_ALIBI:
        z -= slope * tl.abs(position[:, None] - key[None, :]).to(tl.float32)
    return raw, z, slope_of_z, visible


@triton.jit
def attention_statistics_kernel(
    q_ptr, k_ptr, rows_ptr, segments_ptr, key_segments_ptr, key_mask_ptr, mask_ptr, bias_ptr, slopes_ptr, prefix_ptr,
    sums_ptr, H, R, Tq, Tk, G, tiles_per_share,
    stride_qb, stride_qh, stride_qr, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_rows_b, stride_rows_r, stride_prefix, stride_segments_b, stride_segments_t, stride_key_segments_b,
    stride_key_segments_t, stride_key_mask_b, stride_key_mask_t,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, stride_field, stride_share,
    scale, softcap, window, hiding_bias,
    HAS_ROWS: tl.constexpr, HAS_PREFIX: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sums of a block of rows over one share of the keys: m, s, t, z_first, max_raw, num_keys, [6, S, B, H, R]."""
    blocks = tl.cdiv(R, BLOCK_R)
    b, h = (tl.program_id(0) // blocks // H).to(tl.int64), (tl.program_id(0) // blocks % H).to(tl.int64)
    first_r = (tl.program_id(0) % blocks * BLOCK_R).to(tl.int64)
    r = first_r + tl.arange(0, BLOCK_R)
    share = tl.program_id(1)
    index, position, prefix, start, stop = _rows(
        rows_ptr, prefix_ptr, r, b, R, Tq, Tk, stride_rows_b, stride_rows_r, stride_prefix, window,
        HAS_ROWS, HAS_PREFIX, CAUSAL, HAS_WINDOW,
    )  # fmt: skip
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + h)
    zero = tl.zeros((BLOCK_R,), dtype=tl.float32)
    m, max_raw = zero - float("inf"), zero - float("inf")
    s, t, z_first, num_keys = zero, zero, zero, zero
    first_tile = tl.maximum(share * tiles_per_share, start // BLOCK_T)
    for tile in range(first_tile, tl.minimum((share + 1) * tiles_per_share, tl.cdiv(tl.maximum(stop, 0), BLOCK_T))):
        first_j = tl.cast(tile, tl.int64) * BLOCK_T
        raw, z, _, visible = _tile(
            q_ptr, k_ptr, segments_ptr, key_segments_ptr, key_mask_ptr, mask_ptr, bias_ptr, first_r, first_j, index,
            position, b, h, slope, prefix, R, Tk, G,
            stride_qb, stride_qh, stride_qr, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
            stride_segments_b, stride_segments_t, stride_key_segments_b, stride_key_segments_t, stride_key_mask_b,
            stride_key_mask_t, stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
            stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, scale, softcap, window, hiding_bias,
            HAS_PREFIX, CAUSAL, HAS_WINDOW, HAS_SEGMENTS, HAS_KEY_MASK, HAS_MASK, HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP,
            WIDTH, BLOCK_R, BLOCK_T, BLOCK_D, UPCAST,
        )  # fmt: skip
        max_raw = tl.maximum(max_raw, tl.max(tl.where(visible, raw, -float("inf")), 1))
        # the first visible key of the share stays out of the sums
        key = (tile * BLOCK_T + tl.arange(0, BLOCK_T))[None, :]
        first = tl.min(tl.where(visible, key, Tk), 1)
        is_first = visible & (key == first[:, None]) & (num_keys == 0.0)[:, None]
        z_first += tl.sum(tl.where(is_first, z, 0.0), 1)
        z = tl.where(is_first, -float("inf"), tl.where(visible, z, -float("inf")))
        m_new = tl.maximum(m, tl.max(z, 1))
        # rows that have seen only -inf are centred at 0: their sums stay 0 instead of NaN
        centre = tl.where(m_new == -float("inf"), 0.0, m_new)
        shift = tl.where(m == -float("inf"), 0.0, m - centre)
        decay = tl.exp(shift)
        u = z - centre[:, None]
        e = tl.exp(u)
        t = decay * (t + shift * s) + tl.sum(tl.maximum(u, _NO_PROBABILITY) * e, 1)
        s = decay * s + tl.sum(e, 1)
        num_keys += tl.sum(tl.where(visible, 1.0, 0.0), 1)
        m = m_new
    at = sums_ptr + share.to(tl.int64) * stride_share + (b * H + h) * R + r
    tl.store(at, m, mask=r < R)
    tl.store(at + stride_field, s, mask=r < R)
    tl.store(at + 2 * stride_field, t, mask=r < R)
    tl.store(at + 3 * stride_field, z_first, mask=r < R)
    tl.store(at + 4 * stride_field, max_raw, mask=r < R)
    tl.store(at + 5 * stride_field, num_keys, mask=r < R)


@triton.jit
def attention_gradient_kernel(
    da_ptr, q_ptr, k_ptr, rows_ptr, segments_ptr, key_segments_ptr, key_mask_ptr, mask_ptr, bias_ptr, slopes_ptr,
    prefix_ptr, max_logit_ptr, max_logprob_ptr, entropy_ptr, g_entropy_ptr, g_lse_ptr,
    H, R, Tq, Tk, G, first, stride_da,
    stride_qb, stride_qh, stride_qr, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_rows_b, stride_rows_r, stride_prefix, stride_segments_b, stride_segments_t, stride_key_segments_b,
    stride_key_segments_t, stride_key_mask_b, stride_key_mask_t,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    scale, softcap, window, hiding_bias,
    HAS_ROWS: tl.constexpr, HAS_PREFIX: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradient with respect to q.k of a strip of keys that begins at ``first``, [B, H, R, strip]."""
    blocks = tl.cdiv(R, BLOCK_R)
    b, h = (tl.program_id(0) // blocks // H).to(tl.int64), (tl.program_id(0) // blocks % H).to(tl.int64)
    first_r = (tl.program_id(0) % blocks * BLOCK_R).to(tl.int64)
    r = first_r + tl.arange(0, BLOCK_R)
    index, position, prefix, start, stop = _rows(
        rows_ptr, prefix_ptr, r, b, R, Tq, Tk, stride_rows_b, stride_rows_r, stride_prefix, window,
        HAS_ROWS, HAS_PREFIX, CAUSAL, HAS_WINDOW,
    )  # fmt: skip
    row = (b * H + h) * R + r
    at = da_ptr + tl.program_id(1) * BLOCK_T + (row * stride_da)[:, None] + tl.arange(0, BLOCK_T)[None, :]
    first_j = (first + tl.program_id(1) * BLOCK_T).to(tl.int64)
    if (first_j >= stop) | (first_j + BLOCK_T <= start):
        tl.store(at, tl.zeros((BLOCK_R, BLOCK_T), dtype=da_ptr.dtype.element_ty), mask=(r < R)[:, None])
        return
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + h)
    _, z, slope_of_z, visible = _tile(
        q_ptr, k_ptr, segments_ptr, key_segments_ptr, key_mask_ptr, mask_ptr, bias_ptr, first_r, first_j, index,
        position, b, h, slope, prefix, R, Tk, G,
        stride_qb, stride_qh, stride_qr, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
        stride_segments_b, stride_segments_t, stride_key_segments_b, stride_key_segments_t, stride_key_mask_b,
        stride_key_mask_t, stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
        stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, scale, softcap, window, hiding_bias,
        HAS_PREFIX, CAUSAL, HAS_WINDOW, HAS_SEGMENTS, HAS_KEY_MASK, HAS_MASK, HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP,
        WIDTH, BLOCK_R, BLOCK_T, BLOCK_D, UPCAST,
    )  # fmt: skip
    max_logit = tl.load(max_logit_ptr + row, mask=r < R, other=0.0)
    max_logprob = tl.load(max_logprob_ptr + row, mask=r < R, other=0.0)
    entropy = tl.load(entropy_ptr + row, mask=r < R, other=0.0)
    g_entropy = tl.load(g_entropy_ptr + row, mask=r < R, other=0.0)
    g_lse = tl.load(g_lse_ptr + row, mask=r < R, other=0.0)
    # not z - lse: beside a large common offset, lse has lost the digits that log p_max kept
    logp = (z - max_logit[:, None]) + max_logprob[:, None]
    x = tl.maximum(logp, _NO_PROBABILITY) + entropy[:, None]
    da = tl.exp(logp) * (g_lse[:, None] - g_entropy[:, None] * x) * slope_of_z * scale
    tl.store(at, tl.where(visible, da, 0.0).to(da_ptr.dtype.element_ty), mask=(r < R)[:, None])
