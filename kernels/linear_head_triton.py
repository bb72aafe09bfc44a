"""Row statistics of a linear head and their gradients with Triton: logits live in registers only.

Forward: each program owns a block of rows and a share of the vocabulary, and streams over its tiles with the sums of
``linear_head_torch.py``; the shares are merged at the end, so there are no locks and the order of additions is fixed.
Backward: tiles are recomputed and their gradient, in the inputs' dtype, goes to a strip of vocabulary columns within the workspace,
from which two dense matrix products make a finished strip of dWeight and a float32 contribution to dInput.

Shape key: N rows, D width, V vocabulary, S shares of the vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from litropy.kernels.linear_head_types import Cotangents, Head, RowStats, Want
from litropy.kernels.tile_configs import TileConfig, tile_config

__all__ = ["gradient_kernel", "row_gradients", "row_statistics", "statistics_kernel"]


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
    dz_ptr, input_ptr, weight_ptr, bias_ptr, target_ptr, scale_ptr, lse_ptr, entropy_ptr,
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
    lse = tl.load(lse_ptr + n, mask=n < N, other=0.0)
    factor = tl.load(factor_ptr + n, mask=n < N, other=0.0)
    target = tl.full((BLOCK_N,), -1, dtype=tl.int64)
    if HAS_TARGET:
        target = tl.load(target_ptr + n, mask=n < N, other=-1)
        # an ignored row has no lse; +inf makes its probabilities 0
        lse = tl.where(target < 0, float("inf"), lse)
    logp = z - lse[:, None]
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


def _flags(head: Head, target: Tensor | None) -> dict[str, bool]:
    return {
        # the interpreter keeps bfloat16 as integers, which its dot would multiply as such
        "UPCAST": head.weight.device.type == "cpu" and head.weight.dtype == torch.bfloat16,
        "HAS_BIAS": head.bias is not None,
        "HAS_SOFTCAP": bool(head.softcap),
        "HAS_TARGET": target is not None,
        "HAS_SCALE": head.row_inv_temperature is not None,
    }


def _blocks(config: TileConfig) -> dict[str, int | bool]:
    # fusing a multiplication with the addition that follows it only ever saves a rounding
    return {
        "BLOCK_N": config.block_n,
        "BLOCK_V": config.block_v,
        "BLOCK_D": config.block_d,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }


def _config(input: Tensor) -> TileConfig:
    return tile_config(input.dtype, "hip" if torch.version.hip else "cuda")


def _vocabulary_shares(num_row_blocks: int, num_tiles: int, device: torch.device) -> int:
    """Shares of the vocabulary: enough programs to fill the device a few times over."""
    if device.type != "cuda":
        return min(2, num_tiles)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(num_tiles, triton.cdiv(4 * processors, max(1, num_row_blocks))))


def row_statistics(input: Tensor, head: Head, target: Tensor | None, want: Want) -> RowStats:
    """Compute the statistics of every row of ``input`` [N, D]."""
    (N, D), V = input.shape, head.weight.shape[0]
    if not N:
        return RowStats.zeros(0, input, torch.float32, target is not None, want)
    config = _config(input)
    num_blocks, num_tiles = triton.cdiv(N, config.block_n), triton.cdiv(V, config.block_v)
    tiles_per_share = triton.cdiv(num_tiles, _vocabulary_shares(num_blocks, num_tiles, input.device))
    shares = triton.cdiv(num_tiles, tiles_per_share)
    m, s, t, r, z_target = torch.empty((5, shares, N), dtype=torch.float32, device=input.device)
    argmax = torch.empty((shares, N), dtype=torch.int64, device=input.device)
    statistics_kernel[(num_blocks, shares)](
        input, head.weight, head.bias, target, head.row_inv_temperature, m, s, t, r, z_target, argmax,
        N, V, D, tiles_per_share, *input.stride(), *head.weight.stride(), head.softcap, head.inv_temperature,
        **_flags(head, target), WANT_ENTROPY=want.entropy, WANT_MEAN=want.mean_logprob, WANT_ARGMAX=want.argmax,
        **_blocks(config),
    )  # fmt: skip
    counts = torch.full((shares,), tiles_per_share * config.block_v, device=input.device, dtype=torch.float32)
    counts[-1] = V - (shares - 1) * tiles_per_share * config.block_v
    return merge_shares(m, s, t, r, z_target, argmax, counts, target, V, want)


def merge_shares(
    m: Tensor,
    s: Tensor,
    t: Tensor,
    r: Tensor,
    z_target: Tensor,
    argmax: Tensor,
    counts: Tensor,
    target: Tensor | None,
    vocabulary: int,
    want: Want,
) -> RowStats:
    """Merge the sums of S shares of the vocabulary, each [S, N] (``counts`` [S] columns), into the statistics of the rows."""
    top = m.amax(0)
    centre = top.masked_fill(top == -float("inf"), 0.0)
    shift = (m - centre).masked_fill(m == -float("inf"), 0.0)
    decay = shift.exp()
    total = (s * decay).sum(0)
    log_total = total.log()
    empty = log_total[:0]
    stats = RowStats(
        logprob=empty,
        lse=top + log_total,
        entropy=log_total - ((t + s * shift) * decay).sum(0) / total if want.entropy else empty,
        mean_logprob=(r + counts[:, None] * shift).sum(0) / vocabulary - log_total if want.mean_logprob else empty,
        argmax=argmax.gather(0, m.argmax(0, keepdim=True))[0] if want.argmax else argmax[0, :0],
    )
    if target is not None:
        stats.logprob = (z_target.sum(0) - top - log_total).masked_fill(target >= vocabulary, float("nan"))
        stats.zero_where(target < 0)
    return stats


def row_gradients(
    input: Tensor,
    head: Head,
    target: Tensor | None,
    stats: RowStats,
    cotangents: Cotangents,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    budget: int,
) -> None:
    """Write the zero-initialised gradients of input [N, D], weight [V, D] and bias [V] that are given.

    The strip of logit gradients takes at most ``budget`` bytes, or one tile's width of columns where N is too large for that; the
    float32 sum of dInput comes on top for half-precision inputs.
    """
    d_input, d_weight, d_bias = gradients
    (N, D), V = input.shape, head.weight.shape[0]
    if not N:
        return
    if target is not None:
        cotangents = cotangents.zero_where(target < 0)
    config = _config(input)
    strip = min(V, max(1, budget // (N * input.element_size() * config.block_v)) * config.block_v)
    workspace = torch.empty((N, strip), dtype=input.dtype, device=input.device)
    sum_input = None if d_input is None else torch.zeros_like(d_input, dtype=torch.float32)
    zero = stats.lse.new_zeros(1).expand(N)
    factor = cotangents.of_p(stats.lse).contiguous()
    g_logprob = (zero if cotangents.logprob is None else cotangents.logprob).contiguous()
    for first in range(0, V, strip):
        width = min(strip, V - first)
        grid = (triton.cdiv(N, config.block_n), triton.cdiv(width, config.block_v))
        gradient_kernel[grid](
            workspace, input, head.weight, head.bias, target, head.row_inv_temperature, stats.lse, stats.entropy,
            factor, g_logprob, cotangents.entropy, cotangents.mean_logprob,
            N, V, D, first, workspace.stride(0), *input.stride(), *head.weight.stride(), head.softcap,
            head.inv_temperature, **_flags(head, target), HAS_ENTROPY=cotangents.entropy is not None,
            HAS_MEAN=cotangents.mean_logprob is not None, **_blocks(config),
        )  # fmt: skip
        dz = workspace[:, :width]
        if d_weight is not None:
            torch.mm(dz.t(), input, out=d_weight[first : first + width])
        if d_bias is not None:
            d_bias[first : first + width] = dz.sum(0, dtype=torch.float32)
        if sum_input is not None:
            _add_product(sum_input, dz, head.weight[first : first + width])
    if d_input is not None and sum_input is not None:
        d_input.copy_(sum_input)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` without rounding the product to the dtype of a and b, where the device's matrix library can."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(a, b)
