"""Checks and normal form of what the user passes to a linear-head loss: flat rows, one dtype, one implementation."""

import logging
from functools import cache
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from litropy.kernels import implementation
from litropy.kernels.implementation import Impl
from litropy.kernels.linear_head_types import Head
from litropy.kernels.vocab_parallel import NOWHERE, WHOLE, Shard, locate_shard
from litropy.losses.sharded_head import local_head

__all__ = ["HeadInputs", "Impl", "LowRank", "log_once", "prepare", "resolve_impl"]

LowRank = tuple[Tensor, Tensor]
_log = logging.getLogger("litropy")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class HeadInputs(NamedTuple):
    """N flat rows for the kernels."""

    input: Tensor  # [N, D + R]
    head: Head
    target: Tensor | None  # [N], ids of this rank's shard; -1: ignored
    shard: Shard
    dtype: torch.dtype  # of the matrix products
    class_weight: Tensor | None  # [N], the class weight of each row's target
    main_grad: Tensor | None  # [V, D], where the weight's gradient goes


@cache
def log_once(message: str) -> None:
    """Tell the user once a process."""
    _log.info(message)


def resolve_impl(impl: Impl, device: torch.device, dtype: torch.dtype) -> Literal["triton", "torch"]:
    """Choose the implementation, and tell the user once what was chosen."""
    chosen = implementation.resolve_impl(impl, device, dtype)
    if impl == "auto" and not torch.compiler.is_compiling():
        log_once(f"linear head: {chosen} implementation on {device.type}")
    return chosen


def prepare(
    input: Tensor,
    weight: Tensor,
    target: Tensor | None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    low_rank: LowRank | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> HeadInputs:
    """Check shapes, dtypes and options, find this rank's shard, and flatten the rows.

    Args:
        input: hidden states, [..., D].
        weight: head weight, [V, D], possibly a DTensor.
        target: token ids, [...].
        bias: head bias, [V].
        softcap: bound of the logits.
        temperature: a number or one a row.
        low_rank: u [..., R] and B [V, R], which add u B^T to the logits.
        class_weight: weight of each entry of the vocabulary, [V].
        ignore_index: the negative or other id that marks ignored rows; None for every negative one.
        group: ranks that hold shards of the vocabulary.

    Raises:
        ValueError: naming what does not fit and what would.
    """
    main_grad = getattr(weight, "main_grad", None)
    input, weight, bias, target, group = local_head(input, weight, bias, target, group)
    if weight.ndim != 2 or not input.ndim or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"`input` {tuple(input.shape)} and `linear_weight` {tuple(weight.shape)} do not fit: they must be"
            " [..., D] and [V, D]."
        )
    if main_grad is not None and main_grad.shape != weight.shape:
        raise ValueError(
            f"`linear_weight.main_grad` is {tuple(main_grad.shape)}; it must be {tuple(weight.shape)} like the weight."
        )
    V, rows = weight.shape[0], input.shape[:-1]
    if not V and group is None:
        raise ValueError("`linear_weight` has no rows: is it a shard that was not gathered (ZeRO-3, FSDP)?")
    for name, vector in (("linear_bias", bias), ("weight", class_weight)):
        if vector is not None and vector.shape != weight.shape[:1]:
            raise ValueError(f"`{name}` is {tuple(vector.shape)}; it must be [V] = {(V,)}.")
    dtype = _product_dtype(input, weight)
    if target is not None:
        if target.dtype != torch.int64:
            raise ValueError(f"`target` is {target.dtype}; token ids must be int64: use target.long().")
        if target.shape != rows:
            raise ValueError(f"`target` is {tuple(target.shape)}; it must be input.shape[:-1] = {tuple(rows)}.")
        target = _mark_ignored(target.reshape(-1), ignore_index, V if group is None else NOWHERE)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"`softcap` is {softcap}; it must be positive, or None for no softcap.")
    _no_gradient("weight", class_weight)
    flat = input.reshape(-1, input.shape[-1])
    matrix = None
    if low_rank is not None:
        u, matrix = low_rank
        if u.shape[:-1] != rows or matrix.shape != (V, u.shape[-1]):
            raise ValueError(
                f"`low_rank` is {tuple(u.shape)} and {tuple(matrix.shape)}; they must be {(*rows, 'R')} and {(V, 'R')}."
            )
        flat = torch.cat([flat, u.reshape(-1, u.shape[-1]).to(flat.dtype)], 1)
    stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    inv_temperature, row_inv_temperature = _inverse(temperature, rows, stats_dtype)
    head = Head(weight, bias, matrix, None, None, row_inv_temperature, inv_temperature, float(softcap or 0.0))
    if class_weight is not None:
        class_weight = class_weight.to(stats_dtype)
    if group is not None:
        like = flat.new_empty(0, dtype=stats_dtype)
        offset, local, share, total, nll = locate_shard(target, V, flat.shape[0], class_weight, like, group.group_name)
        head = head._replace(mean_weight=share, mean_total=total)
        nll_weight = None if class_weight is None or target is None else nll
        return HeadInputs(
            flat, head, None if target is None else local, Shard(group.group_name, offset), dtype, nll_weight, main_grad
        )
    if class_weight is None:
        return HeadInputs(flat, head, target, WHOLE, dtype, None, main_grad)
    head = head._replace(mean_weight=class_weight / V, mean_total=class_weight.mean())
    nll_weight = None if target is None else class_weight[target.clamp(0, V - 1)]
    return HeadInputs(flat, head, target, WHOLE, dtype, nll_weight, main_grad)


def _product_dtype(input: Tensor, weight: Tensor) -> torch.dtype:
    """That of the head, or autocast's: hidden states are cast to it."""
    for name, tensor in (("input", input), ("linear_weight", weight)):
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"`{name}` is {tensor.dtype}; it must be float32, bfloat16, float16 or float64. A quantised head has to"
                " be dequantised first."
            )
    device = input.device.type
    # autocast leaves float64 alone
    is_cast = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_cast else weight.dtype


def _mark_ignored(target: Tensor, ignore_index: int | None, outside: int) -> Tensor:
    """Map ``ignore_index`` to -1, which the kernels ignore, and other negative targets to an id out of range."""
    if ignore_index is None:
        return target.clamp_min(-1)
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (target < 0) & (target != ignore_index)
        if bool(wrong.any()):
            raise ValueError(
                f"`target` holds {int(target[wrong][0])}, which is neither an entry of the vocabulary"
                f" nor `ignore_index` ({ignore_index})."
            )
    return target.masked_fill(target < 0, outside).masked_fill(target == ignore_index, -1)


def _no_gradient(name: str, value: object) -> None:
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"`{name}` requires a gradient, but none flows to it; pass {name}.detach().")


def _inverse(temperature: float | Tensor, shape: torch.Size, dtype: torch.dtype) -> tuple[float, Tensor | None]:
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(f"`temperature` is {temperature}; it must be positive.")
        return 1.0 / temperature, None
    _no_gradient("temperature", temperature)
    if temperature.shape != shape and temperature.ndim:
        raise ValueError(
            f"`temperature` is {tuple(temperature.shape)}; it must be a number or one value a row, {tuple(shape)}."
        )
    return 1.0, temperature.to(dtype).reciprocal().expand(shape).reshape(-1)
