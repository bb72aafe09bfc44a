"""What attention entropy is computed from, and what comes out.

Shape key: B batch, H query heads, G query heads that share a key head, R selected rows, Tq and Tk positions of queries
and keys, D width of a head.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Attention", "AttentionStats", "RowStats", "RowTerms", "hiding_bias", "ranges", "select_rows", "stats_dtype"]


@dataclass(frozen=True)
class AttentionStats:
    """Statistics of attention rows: one number for each batch entry, query head and selected row, [B, H, R].

    All are float32 (float64 for float64 inputs). A row that sees no key has 0 in every field; a row with a NaN or an
    infinity among its visible logits has NaN in every field but ``visible_keys``.

    Attributes:
        entropy: of the row's probabilities, those of a sink logit included [nats]; differentiable.
        normalized_entropy: ``entropy`` as a share of that of a uniform row over the same n outcomes, ``ln n``, where a
            sink logit is an outcome beside the visible keys; 1 for n = 1, a uniform row as well; differentiable.
        lse: log-sum-exp of the logits, the sink logit included; differentiable.
        max_logit: largest logit of a visible key, after softcap and biases.
        max_raw_logit: largest ``scale q.k`` of a visible key, before softcap and biases: what QK-clip limits.
        p_max: largest probability of a key.
        p_first: probability of the row's first visible key, where models put mass they have no use for.
        p_sink: probability of the sink logit; 0 without one.
        entropy_without_sinks: entropy with first key and sink logit taken out and the rest renormalised [nats].
        visible_keys: how many keys the row sees, the sink logit not counted.
    """

    entropy: Tensor
    normalized_entropy: Tensor
    lse: Tensor
    max_logit: Tensor
    max_raw_logit: Tensor
    p_max: Tensor
    p_first: Tensor
    p_sink: Tensor
    entropy_without_sinks: Tensor
    visible_keys: Tensor


class RowStats(NamedTuple):
    """The fields of ``AttentionStats`` that implementations compute, each [B, H, R]."""

    entropy: Tensor
    lse: Tensor
    max_logit: Tensor
    max_raw_logit: Tensor
    p_max: Tensor
    p_first: Tensor
    p_sink: Tensor
    entropy_without_sinks: Tensor
    visible_keys: Tensor

    @classmethod
    def zeros(cls, q: Tensor, num_rows: int) -> "RowStats":
        """Statistics of rows that see nothing, for queries [B, H, Tq, D]."""
        shape = (*q.shape[:2], num_rows)
        return cls(*(q.new_zeros(shape, dtype=stats_dtype(q.dtype)) for _ in cls._fields))


class RowTerms(NamedTuple):
    """What the gradient of a row's logits is made of, each [B, H, R]."""

    entropy: Tensor
    max_logit: Tensor
    max_logprob: Tensor  # log p_max
    g_entropy: Tensor
    g_lse: Tensor


class Attention(NamedTuple):
    """Keys, and what decides which of them a query sees and with which logit."""

    k: Tensor  # [B, H / G, Tk, D]
    sinks: Tensor | None  # [H]
    segments: Tensor | None  # [B or 1, Tq]
    key_segments: Tensor | None  # [B or 1, Tk]
    key_mask: Tensor | None  # [B or 1, Tk] bool, True: visible
    mask: Tensor | None  # [B or 1, H or 1, Tq or 1, Tk] bool, True: visible
    bias: Tensor | None  # [B or 1, H or 1, Tq or 1, Tk]
    alibi_slopes: Tensor | None  # [H]
    prefix: Tensor | None  # [B or 1]
    scale: float
    softcap: float  # 0: none
    window: int  # 0: unlimited
    causal: bool

    def of_batch(self, batch: slice) -> "Attention":
        """A part of the batch."""

        def part(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape[0] == 1 else x[batch]

        return self._replace(
            k=self.k[batch],
            segments=part(self.segments),
            key_segments=part(self.key_segments),
            key_mask=part(self.key_mask),
            mask=part(self.mask),
            bias=part(self.bias),
            prefix=part(self.prefix),
        )


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which logits of inputs of ``dtype`` are formed and summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def hiding_bias(dtype: torch.dtype) -> float:
    """A bias of ``dtype`` at most this great hides its key: -inf, and the ``finfo.min`` that is written for it."""
    return max(torch.finfo(dtype).min, torch.finfo(torch.float32).min) / 2


def ranges(start: int, stop: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most ``step`` that cover ``start`` to ``stop``."""
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def select_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """Rows of x [B or 1, X, Tq, n] at indices [B or 1, R], in place where all or a broadcast one are meant."""
    if rows is None or x.shape[2] == 1:
        return x
    if rows.shape[0] == 1:
        return x.index_select(2, rows[0])
    x = x.expand(rows.shape[0], -1, -1, -1)
    batch = torch.arange(rows.shape[0], device=rows.device)[:, None]
    return x[batch, :, rows].movedim(1, 2)
