"""Row sums of a linear head and their gradients with Triton: how the kernels are launched and put together.

Forward: each program owns a block of rows and a share of the vocabulary; the shares are merged at the end, so there
are no locks and the order of additions is fixed. Backward: the gradient of recomputed tiles, in the inputs' dtype,
goes to a strip of vocabulary columns within the workspace, from which two dense matrix products make a finished strip
of dWeight and a float32 contribution to dInput; with tiles to skip, ``linear_head_sparse.py`` multiplies the others.

Shape key: N rows, D width, V vocabulary, S shares of the vocabulary, T tiles of it.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from litropy.kernels.linear_head_fused import RowLoss
from litropy.kernels.linear_head_sparse import SparseTiles
from litropy.kernels.linear_head_sums import Sums, finish_sums, merge_sums
from litropy.kernels.linear_head_tiles import Workspace, ranges
from litropy.kernels.linear_head_triton_kernels import block_kernel, gradient_kernel, statistics_kernel
from litropy.kernels.linear_head_types import Cotangents, Gradients, Head, RowStats, Want
from litropy.kernels.tile_configs import TileConfig, tile_config

__all__ = ["block_gradient", "collect_sums", "has_tma", "row_gradients", "row_sums", "sums_wanted", "vocabulary_shares"]

# fields of the array that the kernels store their sums in, in order
_FIELDS = ("m", "s", "t", "t2", "b", "bt", "r", "z_target")
_BLOCK_ROW = 4096


def has_tma(device: torch.device) -> bool:
    """Whether a GPU loads tiles through tensor descriptors: Hopper and data-centre Blackwell."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _describable(x: Tensor | None) -> bool:
    """Whether a matrix can have a tensor descriptor: unit stride, rows and start at multiples of 16 bytes."""
    if x is None:
        return True
    step = x.stride(0) * x.element_size()
    return x.numel() > 0 and x.stride(1) == 1 and step % 16 == 0 and x.data_ptr() % 16 == 0


def _operands(input: Tensor, head: Head, heavy: bool = False) -> tuple[TileConfig, dict[str, Any]]:
    """The tile, and the matrices as the kernels take them: descriptors where the device and their layout allow it."""
    matrices: tuple[Any, ...] = (input, head.weight, head.low_rank)
    tma = has_tma(input.device) and all(_describable(x) for x in matrices)
    config = tile_config(input.dtype, "hip" if torch.version.hip else "cuda", tma, heavy)
    rows = (config.block_n, config.block_v, config.block_v)
    if tma:
        matrices = tuple(
            None if x is None else TensorDescriptor.from_tensor(x, [n, config.block_d])
            for x, n in zip(matrices, rows, strict=True)
        )
    return config, {"input": matrices[0], "weight": matrices[1], "low_rank": matrices[2], "TMA": tma}


def _common(input: Tensor, head: Head, config: TileConfig, has_target: bool) -> dict[str, Any]:
    """Arguments that both kernels over tiles take."""
    low_rank = head.low_rank
    return {
        "N": input.shape[0],
        "V": head.weight.shape[0],
        "D": head.weight.shape[1],
        "R": 0 if low_rank is None else low_rank.shape[1],
        "stride_n": input.stride(0),
        "stride_d": input.stride(1),
        "stride_v": head.weight.stride(0),
        "stride_w": head.weight.stride(1),
        "stride_low_rank": 0 if low_rank is None else low_rank.stride(0),
        "bias_ptr": head.bias,
        "c_ptr": head.mean_weight,
        "scale_ptr": head.row_inv_temperature,
        "softcap": head.softcap,
        "inv_temperature": head.inv_temperature,
        "HAS_BIAS": head.bias is not None,
        "HAS_LOW_RANK": low_rank is not None,
        "HAS_C": head.mean_weight is not None,
        "HAS_SOFTCAP": bool(head.softcap),
        "HAS_SCALE": head.row_inv_temperature is not None,
        "HAS_TARGET": has_target,
        # the interpreter keeps bfloat16 as integers, which its dot would multiply as such
        "UPCAST": input.device.type == "cpu" and input.dtype == torch.bfloat16,
        "BLOCK_N": config.block_n,
        "BLOCK_V": config.block_v,
        "BLOCK_D": config.block_d,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # fusing a multiplication with the addition that follows it only ever saves a rounding
        "enable_fp_fusion": True,
    }


def sums_wanted(want: Want) -> dict[str, bool]:
    """The flags by which kernels know which sums to keep."""
    return {
        "WANT_T": want.first_moment,
        "WANT_T2": want.varentropy,
        "WANT_B": want.collision or want.entropy_drift,
        "WANT_BT": want.entropy_drift,
        "WANT_R": want.mean_logprob,
        "WANT_ARGMAX": want.argmax,
    }


def collect_sums(fields: Tensor, argmax: Tensor, target: Tensor | None, vocabulary: int, want: Want) -> Sums:
    """The sums that the kernels stored, [8, ...], with the fields that nobody asked for left empty."""
    shape = tuple(fields.shape[1:])
    sums = Sums.start(shape, fields, torch.float32, target is not None, want)
    for name, value in zip(_FIELDS, fields, strict=True):
        if getattr(sums, name).numel():
            setattr(sums, name, value)
    if want.argmax:
        sums.argmax = argmax
    if target is not None:
        sums.found = ((target >= 0) & (target < vocabulary)).float().expand(shape)
    return sums


def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def vocabulary_shares(num_row_blocks: int, num_tiles: int, places: int) -> int:
    """Shares of the vocabulary that keep a device busy to the end: as few as take the least time.

    With S shares each program does ``tiles / S`` tiles, and ``row blocks S / places`` of them follow one another, two
    at most.

    Args:
        num_row_blocks: programs for each share.
        num_tiles: tiles of the vocabulary.
        places: programs that run at a time.

    Example::

        >>> vocabulary_shares(64, 1187, places=264)  # 256 programs at once, not 9 shares of 576 in three turns
        4
    """
    most = max(1, min(num_tiles, triton.cdiv(2 * places, max(1, num_row_blocks))))

    def turns_times_tiles(shares: int) -> int:
        return triton.cdiv(num_row_blocks * shares, places) * triton.cdiv(num_tiles, shares)

    return min(range(1, most + 1), key=turns_times_tiles)


def row_sums(
    input: Tensor, head: Head, target: Tensor | None, want: Want, skips: bool = False
) -> tuple[Sums, Tensor | None]:
    """Sum up every row of ``input`` [N, D].

    Returns:
        The sums, and with ``skips`` the logarithm of each row's mass in each tile, [N, T].
    """
    N, V = input.shape[0], head.weight.shape[0]
    # tiles whose masses are wanted must be those of the backward pass
    heavy = not skips and (want.varentropy or want.entropy_drift)
    config, matrices = _operands(input, head, heavy) if N and V else (tile_config(input.dtype), {})
    num_blocks, num_tiles = triton.cdiv(N, config.block_n), triton.cdiv(V, config.block_v)
    masses = torch.empty((N, num_tiles), dtype=torch.float32, device=input.device) if skips else None
    if not N or not V:
        return Sums.start((N,), input, torch.float32, target is not None, want), masses
    # no more than two programs fit a processor, and where one does, they take turns
    planned = vocabulary_shares(num_blocks, num_tiles, 2 * _processors(input.device))
    tiles_per_share = triton.cdiv(num_tiles, planned)
    shares = triton.cdiv(num_tiles, tiles_per_share)
    fields = torch.empty((len(_FIELDS), shares, N), dtype=torch.float32, device=input.device)
    argmax = torch.empty((shares, N), dtype=torch.int64, device=input.device)
    statistics_kernel[(num_blocks, shares)](
        **matrices,
        **_common(input, head, config, target is not None),
        **sums_wanted(want),
        target_ptr=target,
        sums_ptr=fields,
        argmax_ptr=argmax,
        mass_ptr=masses,
        tiles_per_share=tiles_per_share,
        stride_field=fields.stride(0),
        stride_mass=num_tiles,
        WANT_MASS=skips,
    )
    sums = collect_sums(fields, argmax, target, V, want)
    if sums.found.numel():
        sums.found = sums.found / shares  # once, not once a share
    return merge_sums(sums, _weights_of_shares(head, shares, tiles_per_share * config.block_v)), masses


def _weights_of_shares(head: Head, shares: int, columns: int) -> Tensor:
    """Sum of the mean's weights in each share of the vocabulary, [S, 1]."""
    V = head.weight.shape[0]
    parts = list(ranges(V, columns))
    if head.mean_weight is None:
        return head.weight.new_tensor([(part.stop - part.start) / V for part in parts], dtype=torch.float32)[:, None]
    return torch.stack([head.mean_weight[part].sum() for part in parts])[:, None]


def row_gradients(
    input: Tensor,
    head: Head,
    target: Tensor | None,
    stats: RowStats,
    cotangents: Cotangents,
    gradients: Gradients,
    budget: int,
    kept: Tensor | None = None,
) -> None:
    """Add the gradients that are wanted to what is there; arguments as in ``linear_head_torch.row_gradients``.

    The strip of logit gradients takes at most ``budget`` bytes, or one tile's width of columns where N is too large
    for that; the float32 sum of dInput comes on top. ``kept`` [B, T] is about tiles as large as the kernels' own.
    """
    N, V = input.shape[0], head.weight.shape[0]
    if not N or not V or all(gradient is None for gradient in gradients):
        return
    if target is not None:
        cotangents = cotangents.zero_where(target < 0)
    heavy = kept is None and (cotangents.varentropy is not None or cotangents.nucleus_entropy is not None)
    config, matrices = _operands(input, head, heavy)
    strip = min(triton.cdiv(V, config.block_v), max(1, budget // (N * input.element_size() * config.block_v)))
    strip *= config.block_v
    workspace = torch.empty((N, strip), dtype=input.dtype, device=input.device)
    sum_input = None if gradients.input is None else torch.zeros_like(gradients.input, dtype=torch.float32)
    zero = stats.lse.new_zeros(1).expand(N)
    vectors = {
        "factor_ptr": cotangents.of_p(stats.lse, head.mean_total),
        "g_logprob_ptr": zero if cotangents.logprob is None else cotangents.logprob,
        "g_entropy_ptr": cotangents.entropy,
        "g_mean_ptr": cotangents.mean_logprob,
        "g_varentropy_ptr": cotangents.varentropy,
        "g_nucleus_ptr": cotangents.nucleus_entropy,
        "max_logit_ptr": stats.max_logit,
        "max_logprob_ptr": stats.max_logprob,
        "entropy_ptr": stats.entropy,
        "varentropy_ptr": stats.varentropy,
        "boundary_ptr": stats.nucleus_boundary,
        "nucleus_entropy_ptr": stats.nucleus_entropy,
        "nucleus_log_mass_ptr": stats.nucleus_log_mass,
    }
    vectors = {name: None if x is None else x.contiguous() for name, x in vectors.items()}
    sparse = None
    if kept is not None:
        sparse = SparseTiles(kept, input, head, target, stats, cotangents, gradients, sum_input, config)
    for columns in ranges(V, strip):
        tiles = slice(columns.start // config.block_v, triton.cdiv(columns.stop, config.block_v))
        in_strip = None if kept is None else kept[:, tiles].to(torch.uint8)
        num_tiles = triton.cdiv(N, config.block_n) * (tiles.stop - tiles.start)
        # tiles that are left out leave some programs idle, unless each has one
        persistent = config.persistent and kept is None
        gradient_kernel[(min(num_tiles, _processors(input.device)) if persistent else num_tiles,)](
            **matrices,
            **_common(input, head, config, target is not None),
            **vectors,
            dz_ptr=workspace,
            target_ptr=target,
            kept_ptr=in_strip,
            first=columns.start,
            column_blocks=tiles.stop - tiles.start,
            stride_dz=strip,
            stride_kept=tiles.stop - tiles.start,
            PERSISTENT=persistent,
            HAS_KEPT=kept is not None,
            HAS_ENTROPY=cotangents.entropy is not None,
            HAS_MEAN=cotangents.mean_logprob is not None,
            HAS_VARENTROPY=cotangents.varentropy is not None,
            HAS_NUCLEUS=cotangents.nucleus_entropy is not None,
        )
        if sparse is not None:
            sparse.multiply(workspace, columns, tiles)
        else:
            _multiply(workspace[:, : columns.stop - columns.start], input, head, columns, gradients, sum_input)
    if sparse is not None:
        sparse.finish()
    if gradients.input is not None and sum_input is not None:
        gradients.input.add_(sum_input)


def _multiply(
    dz: Tensor, input: Tensor, head: Head, columns: slice, gradients: Gradients, sum_input: Tensor | None
) -> None:
    """Add the products of a strip of logit gradients [N, v]."""
    for width, out in gradients.factors(head):
        if out.dtype == dz.dtype:
            out[columns].addmm_(dz.t(), input[:, width])
        else:
            _add_product(out[columns], dz.t(), input[:, width])
    if gradients.bias is not None:
        gradients.bias[columns] += dz.sum(0, dtype=torch.float32).to(gradients.bias.dtype)
    if sum_input is not None:
        for width, matrix in head.factors():
            _add_product(sum_input[:, width], dz, matrix[columns])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` without rounding the product to the dtype of a and b, where the device can."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(a, b)


def block_gradient(
    tile: Tensor, head: Head, target: Tensor, loss: RowLoss, want: Want, work: Workspace, sum_bias: Tensor | None
) -> RowStats:
    """Turn raw logits [n, V] into their gradient in place; add that of the bias; return the rows' statistics."""
    n, V = tile.shape
    fields = torch.empty((len(_FIELDS), n), dtype=torch.float32, device=tile.device)
    argmax = torch.empty(n, dtype=torch.int64, device=tile.device)
    mean_total = 1.0 if head.mean_total is None else head.mean_total
    block_kernel[(n,)](
        tile, head.mean_weight, target, head.row_inv_temperature, loss.row_weight.contiguous(), loss.nll_weight,
        head.mean_total, fields, argmax, V, tile.stride(0), fields.stride(0), head.softcap, head.inv_temperature,
        loss.label_smoothing, loss.z_loss, HAS_C=head.mean_weight is not None, HAS_SOFTCAP=bool(head.softcap),
        HAS_SCALE=head.row_inv_temperature is not None, HAS_NLL_WEIGHT=loss.nll_weight is not None,
        HAS_MEAN_TOTAL=head.mean_total is not None, **sums_wanted(want),
        BLOCK_V=min(_BLOCK_ROW, triton.next_power_of_2(V)), num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    if sum_bias is not None:
        sum_bias += tile.sum(0, dtype=torch.float32)
    return finish_sums(collect_sums(fields, argmax, target, V, want), target, mean_total, want)
