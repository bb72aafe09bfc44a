"""One call of attention as a frozen record: queries, keys, and which keys a query sees.

Shape key: B batch, H query heads, Hkv key heads, Tq and Tk positions of queries and keys, D width of a head, S selected
sequences, R selected rows.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from litropy.kernels.attention_entropy import AttentionStats, attention_entropy
from litropy.kernels.attention_entropy_types import hiding_bias

__all__ = ["AttentionCall", "Source", "layer_number"]

Source = Literal["interface", "scaled_dot_product_attention", "softmax", "reported"]

_ALL = slice(None)


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionCall:
    """What an attention module passed to its attention function; tensors are the model's own, with their graph.

    Attributes:
        module: the attention module.
        name: its path in the model that is captured.
        layer: its number among the layers, if that can be told.
        source: where the call was seen: ``"interface"`` (transformers' attention functions),
            ``"scaled_dot_product_attention"``, ``"softmax"`` (a softmax over stored logits: queries and keys are
            unknown, so ``q`` and ``k`` are zeros and ``bias`` holds the logits) or ``"reported"`` (by
            ``report_attention``).
        recomputed: whether this is activation checkpointing repeating a call in the backward pass.
        q: queries as they enter the product, after rotary embeddings and normalisation, [B, H, Tq, D].
        k: keys, [B, Hkv, Tk, D].
        scale: factor of q.k; None for 1 / sqrt(D).
        causal: whether a query sees no later keys; the last query stands at the last key.
        window: how many keys back a query sees, its own included; None for all.
        softcap: bound of the scaled logits, or None.
        sinks: a logit for each head, [H], that takes probability and is no key.
        mask: True where a key is visible, [B or 1, H or 1, Tq or 1, Tk].
        bias: what is added to the logits, of the same shape, detached; keys with -inf or its dtype's least are hidden.
        key_mask: True where a key is visible, [B, Tk]; queries at hidden positions are padding.
        segment_ids: document of each query, [B, Tq].
        key_segment_ids: document of each key, [B, Tk]; None for those of the queries.
        visible: for flex attention's masks: which keys rows [R] of some sequences see, [S, H or 1, R, Tk].
    """

    module: nn.Module
    name: str
    layer: int | None
    source: Source
    recomputed: bool
    q: Tensor
    k: Tensor
    scale: float | None = None
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    key_mask: Tensor | None = None
    segment_ids: Tensor | None = None
    key_segment_ids: Tensor | None = None
    visible: Callable[[slice, Tensor], Tensor] | None = None

    def stats(self, rows: Tensor | None = None, sequences: slice = _ALL) -> AttentionStats:
        """Entropy and other statistics of this call's attention; differentiable with respect to q, k and sinks.

        Args:
            rows: which queries, [R] int64 on the device of ``q``; None for all.
            sequences: which part of the batch.

        Returns:
            Statistics [S, H, R]: see ``litropy.kernels.attention_entropy``. For the source ``"softmax"``, the largest
            raw logit is the largest logit with all that was added to it.
        """
        options: dict[str, Any] = {
            name: part(getattr(self, name), sequences)
            for name in ("mask", "bias", "key_mask", "segment_ids", "key_segment_ids")
        }
        options |= {"scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}
        q, k = self.q[sequences], self.k[sequences]
        if self.visible is not None:
            # only these rows' mask is ever formed; positions mean nothing any more, and nothing else hides keys
            rows = torch.arange(q.shape[2], device=q.device) if rows is None else rows
            options["mask"] = self.visible(sequences, rows)
            if self.bias is not None and self.bias.shape[2] > 1:
                options["bias"] = options["bias"].index_select(2, rows)
            q, rows = q.index_select(2, rows), None
        else:
            options |= {"causal": self.causal, "window": self.window}
        stats = attention_entropy(q, k, rows=rows, **options)
        return replace(stats, max_raw_logit=stats.max_logit) if self.source == "softmax" else stats

    def padding(self, rows: Tensor, sequences: slice = _ALL) -> Tensor | None:
        """Which rows are padding, [S, R]; None if none can be.

        In self-attention a padded position is hidden as a key: from its own query and from the next one, which tells
        it from masks that only keep a query from itself.

        Args:
            rows: which queries, [R] int64.
            sequences: which part of the batch.
        """
        if self.q.shape[2] != self.k.shape[2]:
            return None
        following = (rows + 1).clamp_max(self.k.shape[2] - 1)
        hidden = []
        if self.key_mask is not None:
            hidden.append(~self.key_mask[sequences][:, rows])
        if self.mask is not None:
            mask = part(self.mask, sequences)[:, 0]
            hidden.append(~(_at(mask, rows, rows) | _at(mask, following, rows)))
        if self.bias is not None:
            bias, least = part(self.bias, sequences)[:, 0], hiding_bias(self.bias.dtype)
            hidden.append((_at(bias, rows, rows) <= least) & (_at(bias, following, rows) <= least))
        if self.visible is not None:
            mask = self.visible(sequences, torch.cat([rows, following]))[:, 0]
            number = torch.arange(len(rows), device=rows.device)
            hidden.append(~(_at(mask, number, rows) | _at(mask, number + len(rows), rows)))
        if not hidden:
            return None
        return torch.stack(torch.broadcast_tensors(*hidden)).any(0).expand(self.q[sequences].shape[0], -1)


def part(x: Any, sequences: slice) -> Any:
    """A part of the batch of x [B or 1, ...], which may be None."""
    return x if x is None or x.shape[0] == 1 else x[sequences]


def _at(mask: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
    """Entries (row, key) of a mask [S or 1, Tq or 1, Tk], [S or 1, R]."""
    return mask[:, rows if mask.shape[1] > 1 else torch.zeros_like(rows), keys]


def layer_number(module: nn.Module, name: str) -> int | None:
    """Number of a layer: its ``layer_idx``, else the last number in its path.

    Example::

        >>> layer_number(nn.Identity(), "encoder.layers.11.self_attn")
        11
    """
    index = getattr(module, "layer_idx", None)
    if isinstance(index, int):
        return index
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return int(numbers[-1]) if numbers else None
