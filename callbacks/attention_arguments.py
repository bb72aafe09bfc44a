"""What the arguments of the various attention functions mean, in the terms of ``AttentionCall``.

Two functions with the same arguments may mean different things by them. Without a mask, ``sdpa`` is causal if its
module is, and ``eager`` never; only flash attention reads the sliding window, because the masks of the others hold it.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

__all__ = ["Kind", "of_interface", "of_reported", "of_sdpa", "of_softmax"]

Kind = Literal["eager", "sdpa", "flash", "flex"]

# names by which attention modules know the number of their query heads
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead")


def of_interface(
    kind: Kind, module: nn.Module, query: Tensor, key: Tensor, attention_mask: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Read a call of one of transformers' attention functions.

    Args:
        kind: whose conventions the function follows.
        module: the attention module.
        query: [B, H, Tq, D].
        key: [B, Hkv, Tk, D].
        attention_mask: as that kind of function takes it.
        options: the other keyword arguments.

    Raises:
        ValueError: if the call changes attention in a way that is not understood.
    """
    found = _products(query, key, options.get("scaling"))
    Tq, Tk = query.shape[2], key.shape[2]
    is_causal = options.get("is_causal")
    is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if isinstance(attention_mask, BlockMask):
        found["visible"] = _flex_mask(attention_mask, query, Tk)
    elif kind == "flash":
        found |= _flash(query, key, attention_mask, is_causal, options)
    elif attention_mask is not None:
        found |= _mask_or_bias(attention_mask[..., :Tk], query)
    elif kind == "sdpa" and is_causal and Tq > 1:
        found["causal"] = True
        if Tk > Tq:  # the mask of is_causal starts at the first key
            found["k"] = found["k"][:, :, :Tq]
    if options.get("position_bias") is not None:
        bias = options["position_bias"][..., : found["k"].shape[2]].detach()
        found["bias"] = bias if found.get("bias") is None else bias + found["bias"]
    return found | _softmax_options(kind, module, options)


def _softmax_options(kind: Kind, module: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """Softcap and sink logits."""
    sinks = options.get("s_aux")
    if sinks is None and kind == "eager":
        sinks = getattr(module, "sinks", None)
    if sinks is None:
        sinks = options.get("sinks")
    if sinks is not None and sinks.ndim != 1:
        raise ValueError(
            f"{type(module).__name__} passes sink logits of shape {tuple(sinks.shape)} to its attention function; only"
            " one for each head is understood."
        )
    # transformers' sdpa function drops sinks
    return {"softcap": options.get("softcap"), "sinks": None if kind == "sdpa" else sinks}


def _flash(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, is_causal: bool, options: Mapping[str, Any]
) -> dict[str, Any]:
    B, Tq, Tk = query.shape[0], query.shape[2], key.shape[2]
    window = options.get("sliding_window")
    found: dict[str, Any] = {"causal": is_causal, "window": window if window is not None and Tk > window else None}
    cu_q, cu_k = options.get("cu_seq_lens_q"), options.get("cu_seq_lens_k")
    position_ids = options.get("position_ids")
    if attention_mask is not None:
        found["key_mask"] = attention_mask[:, -Tk:].bool()
    elif cu_q is not None and cu_k is not None:
        found["segment_ids"] = _segments(cu_q, B, Tq)
        found["key_segment_ids"] = None if Tq == Tk and cu_q is cu_k else _segments(cu_k, B, Tk)
    elif position_ids is not None and position_ids.ndim == 2 and B == 1 and Tq == Tk == position_ids.shape[1]:
        found["segment_ids"] = (position_ids == 0).cumsum(1)
    return found


def _segments(cu_seq_lens: Tensor, batch: int, length: int) -> Tensor:
    """Documents of positions that lie in a row, from where they begin and end."""
    position = torch.arange(batch * length, device=cu_seq_lens.device)
    return torch.searchsorted(cu_seq_lens[1:].contiguous(), position, right=True).view(batch, length)


def _flex_mask(block_mask: BlockMask, query: Tensor, num_keys: int) -> Any:
    """The function of rows behind a block mask."""
    batch, heads = block_mask.shape[0], block_mask.shape[1]

    def visible(sequences: slice, rows: Tensor) -> Tensor:
        b = torch.arange(query.shape[0], device=rows.device)[sequences, None, None, None]
        h = torch.arange(heads if heads > 1 else 1, device=rows.device)[:, None, None]
        j = torch.arange(num_keys, device=rows.device)
        seen = block_mask.mask_mod(b if batch > 1 else torch.zeros_like(b), h, rows[:, None], j)
        return seen.expand(b.shape[0], h.shape[0], len(rows), num_keys)

    return visible


def of_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> dict[str, Any]:
    """Read a call of ``torch.nn.functional.scaled_dot_product_attention``."""
    query, key, attn_mask = _four_axes(query, key, attn_mask)
    found = _products(query, key, scale)
    Tq, Tk = query.shape[2], key.shape[2]
    if attn_mask is not None:
        found |= _mask_or_bias(attn_mask, query)
    elif is_causal and Tk < Tq:  # aligned at the first key, and here not at the last
        found["mask"] = torch.ones(Tq, Tk, dtype=torch.bool, device=query.device).tril()[None, None]
    elif is_causal:
        found |= {"causal": True, "k": found["k"][:, :, :Tq]}
    return found


def _four_axes(query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Give queries, keys and mask the axes batch and head: fewer are one head, more are one batch."""
    if mask is not None:
        mask = mask.expand(*mask.shape[:-1], key.shape[-2])
    if query.ndim < 4:
        lead = (None,) * (4 - query.ndim)
        if query.ndim == 3:  # [B, T, D]
            return query[:, None], key[:, None], mask[:, None] if mask is not None and mask.ndim == 3 else mask
        return query[lead], key[lead], mask
    lead_shape = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3])
    if query.ndim > 4 and mask is not None and mask.ndim > 3:
        mask = mask.expand(*lead_shape, *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])
    query, key = (x.expand(*lead_shape, *x.shape[-3:]).reshape(-1, *x.shape[-3:]) for x in (query, key))
    return query, key, mask


def of_softmax(module: nn.Module, logits: Tensor, dim: Any) -> dict[str, Any] | None:
    """Read a softmax over stored logits [B, H, Tq, Tk] or [B * H, Tq, Tk]; None if it is something else."""
    if dim not in (-1, logits.ndim - 1) or not logits.is_floating_point():
        return None
    if logits.ndim == 3:
        heads = next((getattr(module, name) for name in _HEADS if isinstance(getattr(module, name, None), int)), 0)
        if not heads or logits.shape[0] % heads:
            return None
        logits = logits.unflatten(0, (-1, heads))
    if logits.ndim != 4:
        return None
    B, H, Tq, Tk = logits.shape
    nothing = torch.zeros((), device=logits.device)
    return {
        "q": nothing.expand(B, H, Tq, 1),
        "k": nothing.expand(B, 1, Tk, 1),
        "scale": 1.0,
        "bias": logits.detach(),
    }


def of_reported(q: Tensor, k: Tensor, options: Mapping[str, Any]) -> dict[str, Any]:
    """Read what a user reports: fields of ``AttentionCall``."""
    bias = options.get("bias")
    return {"q": q, "k": k, **options} | ({} if bias is None else {"bias": bias.detach()})


def _products(query: Tensor, key: Tensor, scale: Any) -> dict[str, Any]:
    """Queries and keys of one dtype and batch size, and a factor that is a number."""
    if isinstance(scale, Tensor):
        query, scale = query * scale, 1.0
    dtype = torch.promote_types(query.dtype, key.dtype)
    B = max(query.shape[0], key.shape[0])
    heads = max(query.shape[1], key.shape[1])
    query = query.expand(B, heads, -1, -1)
    return {"q": query.to(dtype), "k": key.expand(B, -1, -1, -1).to(dtype), "scale": scale}


def _mask_or_bias(mask: Tensor, query: Tensor) -> dict[str, Any]:
    mask = mask[(None,) * (4 - mask.ndim)]
    if mask.dtype == torch.bool:
        return {"mask": mask}
    return {"bias": (mask if mask.is_floating_point() else mask.to(query.dtype)).detach()}
