"""Row statistics of a linear head and their gradients with Triton: how the kernels are launched and put together.

Forward: each program owns a block of rows and a share of the vocabulary; the shares are merged at the end, so there
are no locks and the order of additions is fixed. Backward: the gradient of recomputed tiles, in the inputs' dtype,
goes to a strip of vocabulary columns within the workspace, from which two dense matrix products make a finished strip
of dWeight and a float32 contribution to dInput.

Shape key: N rows, D width, V vocabulary, S shares of the vocabulary.
"""

import torch
import triton
from torch import Tensor

from litropy.kernels.linear_head_triton_kernels import gradient_kernel, statistics_kernel
from litropy.kernels.linear_head_types import Cotangents, Head, RowStats, Want
from litropy.kernels.tile_configs import TileConfig, tile_config

__all__ = ["merge_shares", "row_gradients", "row_statistics"]


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
    """Merge the sums of S shares of the vocabulary, each [S, N], with ``counts`` [S] columns, into rows' statistics."""
    top = m.amax(0)
    centre = top.masked_fill(top == -float("inf"), 0.0)
    shift = (m - centre).masked_fill(m == -float("inf"), 0.0)
    decay = shift.exp()
    total = (s * decay).sum(0)
    log_total = total.log()
    stats = RowStats.zeros(0, top, top.dtype, False, Want())
    stats.lse, stats.max_logit, stats.max_logprob = top + log_total, top, -log_total
    if want.entropy:
        stats.entropy = log_total - ((t + s * shift) * decay).sum(0) / total
    if want.mean_logprob:
        stats.mean_logprob = (r + counts[:, None] * shift).sum(0) / vocabulary - log_total
    if want.argmax:
        # the first of the greatest shares, so that a tie keeps the lower index
        stats.argmax = argmax.gather(0, m.argmax(0, keepdim=True))[0]
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

    The strip of logit gradients takes at most ``budget`` bytes, or one tile's width of columns where N is too large
    for that; the float32 sum of dInput comes on top.
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
            workspace, input, head.weight, head.bias, target, head.row_inv_temperature, stats.max_logit,
            stats.max_logprob, stats.entropy,
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
    """``total += a @ b`` without rounding the product to the dtype of a and b, where the device can."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(a, b)
