"""Attention entropy and its gradient with Triton: how the kernels are launched and put together.

Forward: each program owns a block of rows of one head and a share of the keys; the shares are merged at the end, so
there are no locks and the order of additions is fixed. Backward: the gradient of recomputed tiles, in the inputs'
dtype, goes to a strip of keys within the workspace, from which two dense matrix products make a finished strip of dk
and a float32 contribution to dq.

Shape key: B batch, H query heads, G query heads that share a key head, R selected rows, Tk keys, D width, S shares of
the keys.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from litropy.kernels.attention_entropy_sums import Sums, finish
from litropy.kernels.attention_entropy_torch import without_nan
from litropy.kernels.attention_entropy_triton_kernels import attention_gradient_kernel, attention_statistics_kernel
from litropy.kernels.attention_entropy_types import Attention, RowStats, RowTerms, hiding_bias, ranges, select_rows
from litropy.kernels.tile_configs import TileConfig, attention_tile_config

__all__ = ["row_gradients", "row_stats"]

# bytes of the strip of logit gradients
_STRIP = 64 << 20


def _common(q: Tensor, attention: Attention, rows: Tensor | None, num_queries: int, tile: TileConfig) -> dict[str, Any]:
    """Arguments that both kernels take; ``q`` has the selected rows, [B, H, R, D]."""
    a = attention
    B, H, R, D = q.shape
    Tk = a.k.shape[2]
    segments, key_segments = (
        None if x is None else x.to(torch.int32).expand(B, -1) for x in (a.segments, a.key_segments)
    )
    key_mask = None if a.key_mask is None else a.key_mask.view(torch.uint8).expand(B, -1)
    mask = None if a.mask is None else a.mask.view(torch.uint8).expand(B, H, num_queries, Tk)
    bias = None if a.bias is None else a.bias.expand(B, H, num_queries, Tk)
    prefix = None if a.prefix is None else a.prefix.expand(B)
    tensors = {
        "rows": (None if rows is None else rows.expand(B, -1), "br"),
        "segments": (segments, "bt"),
        "key_segments": (key_segments, "bt"),
        "key_mask": (key_mask, "bt"),
        "mask": (mask, "bhqk"),
        "bias": (bias, "bhqk"),
    }
    arguments: dict[str, Any] = {}
    for name, (x, axes) in tensors.items():
        arguments[f"{name}_ptr"] = x
        arguments[f"HAS_{name.upper()}"] = x is not None
        for i, axis in enumerate(axes):
            arguments[f"stride_{name}_{axis}"] = 0 if x is None else x.stride(i)
    del arguments["HAS_KEY_SEGMENTS"]
    for i, axis in enumerate("bhrd"):
        arguments[f"stride_q{axis}"] = q.stride(i)
    for i, axis in enumerate("bhtd"):
        arguments[f"stride_k{axis}"] = a.k.stride(i)
    return arguments | {
        "q_ptr": q,
        "k_ptr": a.k,
        "slopes_ptr": None if a.alibi_slopes is None else a.alibi_slopes.to(torch.float32).contiguous(),
        "prefix_ptr": prefix,
        "stride_prefix": 0 if prefix is None else prefix.stride(0),
        "H": H,
        "R": R,
        "Tq": num_queries,
        "Tk": Tk,
        "G": H // a.k.shape[1],
        "scale": a.scale,
        "softcap": a.softcap,
        "window": min(a.window, num_queries + Tk),  # no further, so that sums fit 32 bits
        "hiding_bias": 0.0 if bias is None else hiding_bias(bias.dtype),
        "HAS_ALIBI": a.alibi_slopes is not None,
        "HAS_PREFIX": prefix is not None,
        "HAS_WINDOW": a.window > 0,
        "HAS_SOFTCAP": a.softcap > 0,
        "CAUSAL": a.causal,
        # the interpreter keeps bfloat16 as integers, which its dot would multiply as such
        "UPCAST": q.device.type == "cpu" and q.dtype == torch.bfloat16,
        "WIDTH": D,
        "BLOCK_R": tile.block_n,
        "BLOCK_T": tile.block_v,
        "BLOCK_D": tile.block_d,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        # fusing a multiplication with the addition that follows it only ever saves a rounding
        "enable_fp_fusion": True,
    }


def _shares_of_keys(programs: int, num_tiles: int, device: torch.device) -> int:
    """Shares of the keys: enough programs to fill the device a few times over."""
    if device.type != "cuda":
        return min(2, num_tiles)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(num_tiles, triton.cdiv(4 * processors, programs)))


def row_stats(q: Tensor, attention: Attention, rows: Tensor | None) -> RowStats:
    """Statistics of queries [B, H, Tq, D] at ``rows`` [B or 1, R], or of all."""
    num_queries, selected = q.shape[2], select_rows(q, rows)
    B, H, R, _ = selected.shape
    Tk = attention.k.shape[2]
    if not selected.numel() or not Tk:
        return RowStats.zeros(q, R)
    tile = attention_tile_config(q.dtype, q.shape[3])
    programs, num_tiles = triton.cdiv(R, tile.block_n) * B * H, triton.cdiv(Tk, tile.block_v)
    tiles_per_share = triton.cdiv(num_tiles, _shares_of_keys(programs, num_tiles, q.device))
    shares = triton.cdiv(num_tiles, tiles_per_share)
    sums = torch.empty((len(Sums._fields), shares, B, H, R), dtype=torch.float32, device=q.device)
    attention_statistics_kernel[(programs, shares)](
        **_common(selected, attention, rows, num_queries, tile),
        sums_ptr=sums,
        tiles_per_share=tiles_per_share,
        stride_field=sums.stride(0),
        stride_share=sums.stride(1),
    )
    return finish(Sums(*sums), attention.sinks)


def row_gradients(
    q: Tensor,
    attention: Attention,
    rows: Tensor | None,
    terms: RowTerms,
    d_rows: Tensor | None,
    d_k: Tensor | None,
) -> None:
    """Write the gradients of keys [B, H / G, Tk, D], and add those of rows [B, H, R, D] in float32."""
    num_queries, selected = q.shape[2], select_rows(q, rows)
    B, H, R, D = selected.shape
    k = attention.k
    heads, Tk = k.shape[1:3]
    if not selected.numel() or not Tk:
        return
    tile = attention_tile_config(q.dtype, q.shape[3])
    strip = min(triton.cdiv(Tk, tile.block_v), max(1, _STRIP // (B * H * R * q.element_size() * tile.block_v)))
    strip *= tile.block_v
    workspace = torch.empty((B, H, R, strip), dtype=q.dtype, device=q.device)
    vectors = {f"{name}_ptr": x.contiguous() for name, x in terms._asdict().items()}
    clean_q = without_nan(selected).reshape(B * heads, -1, D)
    for keys in ranges(0, Tk, strip):
        n = keys.stop - keys.start
        attention_gradient_kernel[(triton.cdiv(R, tile.block_n) * B * H, triton.cdiv(n, tile.block_v))](
            **_common(selected, attention, rows, num_queries, tile),
            **vectors,
            da_ptr=workspace,
            first=keys.start,
            stride_da=strip,
        )
        # the rows of query heads that share a key head follow one another
        da = workspace.view(B * heads, -1, strip)[:, :, :n]
        if d_k is not None:
            d_k[:, :, keys] = torch.bmm(da.transpose(1, 2), clean_q).view(B, heads, n, D)
        if d_rows is not None:
            d_rows += _product(da, without_nan(k[:, :, keys]).reshape(B * heads, n, D)).view(d_rows.shape)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` [b, m, n] in float32, without rounding it to the dtype of a and b where the device can."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    if a.device.type == "cuda":
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())
