"""Checks and normal form of what the user passes to ``attention_entropy``."""

from typing import Literal

import torch
from torch import Tensor

from litropy.kernels.attention_entropy_types import Attention

__all__ = ["check_rows", "prepare"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def prepare(
    q: Tensor,
    k: Tensor,
    rows: Tensor | None,
    *,
    scale: float | None,
    causal: bool,
    window: int | None,
    prefix_length: int | Tensor | None,
    segment_ids: Tensor | None,
    key_segment_ids: Tensor | None,
    position_ids: Tensor | None,
    key_mask: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Attention, Tensor | None]:
    """Check shapes, dtypes and options, and put them into the form that the operator takes; rows become [B or 1, R].

    Raises:
        ValueError: naming what does not fit and what would.
    """
    _check_queries_and_keys(q, k)
    B, H, Tq, D = q.shape
    Tk = k.shape[2]
    if window is not None and window < 1:
        raise ValueError(f"`window` is {window}; it must be at least 1, the key at the query's own position, or None.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"`softcap` is {softcap}; it must be positive, or None for no softcap.")
    if position_ids is not None:
        if segment_ids is not None or Tq != Tk:
            why = "segment_ids are given too" if segment_ids is not None else f"Tq = {Tq} and Tk = {Tk} differ"
            raise ValueError(f"`position_ids` cannot tell the documents apart: {why}. Pass segment_ids alone.")
        _check("position_ids", position_ids, (B, Tq), "integer")
        segment_ids = _segments(position_ids)
    if key_segment_ids is None:
        if segment_ids is not None and Tq != Tk:
            raise ValueError(
                f"`key_segment_ids` must be given with `segment_ids` where Tq = {Tq} and Tk = {Tk} differ."
            )
        key_segment_ids = segment_ids
    elif segment_ids is None:
        raise ValueError("`key_segment_ids` needs `segment_ids`, those of the queries.")
    _check("segment_ids", segment_ids, (B, Tq), "integer")
    _check("key_segment_ids", key_segment_ids, (B, Tk), "integer")
    _check("key_mask", key_mask, (B, Tk), "bool")
    _check("mask", mask, (B, H, Tq, Tk), "bool")
    _check("bias", bias, (B, H, Tq, Tk), "float")
    for name, vector in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if vector is not None and (vector.shape != (H,) or not vector.is_floating_point()):
            raise ValueError(f"`{name}` is {vector.dtype} {tuple(vector.shape)}; it must be floating, [H] = {(H,)}.")
    for name, tensor in (("bias", bias), ("alibi_slopes", alibi_slopes)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"`{name}` requires a gradient, but none flows to it; pass {name}.detach().")
    attention = Attention(
        k=k,
        sinks=sinks,
        segments=segment_ids,
        key_segments=key_segment_ids,
        key_mask=key_mask,
        mask=mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        prefix=_prefix(prefix_length, q, causal),
        scale=D**-0.5 if scale is None else float(scale),
        softcap=float(softcap or 0.0),
        window=window or 0,
        causal=causal,
    )
    return attention, _rows(rows, q)


def _check_queries_and_keys(q: Tensor, k: Tensor) -> None:
    fits = q.ndim == 4 and k.ndim == 4 and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] > 0
    if not fits or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"`q` {tuple(q.shape)} and `k` {tuple(k.shape)} do not fit: they must be [B, H, Tq, D] and [B, Hkv, Tk, D]"
            " with H a multiple of Hkv."
        )
    if q.dtype not in _DTYPES or k.dtype != q.dtype:
        raise ValueError(
            f"`q` is {q.dtype} and `k` {k.dtype}; both must be float32, bfloat16, float16 or float64, and the same."
        )


def _check(name: str, x: Tensor | None, shape: tuple[int, ...], kind: Literal["bool", "integer", "float"]) -> None:
    """Check a tensor that covers the whole ``shape``, or has 1 where it is the same along an axis but the last."""
    if x is None:
        return
    if x.ndim != len(shape) or not all(_fits(x.shape[i], n, i < x.ndim - 1) for i, n in enumerate(shape)):
        raise ValueError(f"`{name}` is {tuple(x.shape)}; it must be {shape}, or 1 on any axis but the last.")
    is_integer = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    right = {"bool": x.dtype == torch.bool, "integer": is_integer, "float": x.is_floating_point()}[kind]
    if not right:
        hint = ", True where a key is visible (of a mask of ones and zeros, pass mask.bool())" if kind == "bool" else ""
        raise ValueError(f"`{name}` is {x.dtype}; it must be {kind}{hint}.")


def _fits(found: int, size: int, may_be_one: bool = True) -> bool:
    # compared one by one: torch.compile does not look up symbolic sizes in tuples
    return found == size or (may_be_one and found == 1)


def _segments(position_ids: Tensor) -> Tensor:
    """Ids of the packed documents: another one begins wherever a position does not follow the one before."""
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return torch.nn.functional.pad(starts.cumsum(1), (1, 0))


def _prefix(prefix_length: int | Tensor | None, q: Tensor, causal: bool) -> Tensor | None:
    if prefix_length is None:
        return None
    if not causal:
        raise ValueError("`prefix_length` needs causal=True: without it, every key before and after is visible anyway.")
    if isinstance(prefix_length, int):
        return torch.full((1,), prefix_length, device=q.device)
    if prefix_length.ndim != 1 or not _fits(prefix_length.shape[0], q.shape[0]) or prefix_length.is_floating_point():
        raise ValueError(
            f"`prefix_length` is {prefix_length.dtype} {tuple(prefix_length.shape)}; it must be an integer, or [B] ="
            f" {(q.shape[0],)} integers."
        )
    return prefix_length


def _rows(rows: Tensor | None, q: Tensor) -> Tensor | None:
    if rows is None:
        return None
    if (
        rows.ndim not in (1, 2)
        or (rows.ndim == 2 and not _fits(rows.shape[0], q.shape[0]))
        or rows.dtype != torch.int64
    ):
        raise ValueError(
            f"`rows` is {rows.dtype} {tuple(rows.shape)}; it must be int64, [R] for the whole batch or [B, R] with"
            f" B = {q.shape[0]}."
        )
    return rows if rows.ndim == 2 else rows[None]


def check_rows(rows: Tensor, num_queries: int) -> tuple[Tensor, Tensor | None]:
    """Raise on a CPU if a row does not exist; elsewhere, where looking would wait, say which ones do not.

    Returns:
        Rows that can be read, and a bool mask of those that are not what was asked for.
    """
    inside = (rows >= 0) & (rows < num_queries)
    if rows.device.type == "cpu":
        if not bool(inside.all()):
            raise ValueError(f"`rows` holds {int(rows[~inside][0])}; q has rows 0 to {num_queries - 1}.")
        return rows, None
    return rows.clamp(0, max(0, num_queries - 1)), ~inside
