"""What every implementation of the linear head takes and returns.

Shape key: N rows, D width, R width of a low-rank addition, V vocabulary (of this shard, if there are several).
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor

__all__ = ["Cotangents", "Gradients", "Head", "RowStats", "Want", "loss_cotangents", "row_losses"]


class Head(NamedTuple):
    """A linear head and what it does to its logits: ``softcap tanh((h W^T + u B^T + b) / softcap) * inv_temperature``.

    Where there is a low-rank addition B, its input u [N, R] stands behind h [N, D] in the same rows: [N, D + R].
    """

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    low_rank: Tensor | None = None  # [V, R]
    mean_weight: Tensor | None = None  # [V], share of each entry in mean_logprob; None: 1 / V each
    mean_total: Tensor | None = None  # the sum of mean_weight over all shards, a scalar; None: 1
    row_inv_temperature: Tensor | None = None  # [N], in place of the scalar
    inv_temperature: float = 1.0
    softcap: float = 0.0  # 0: none

    @property
    def stats_dtype(self) -> torch.dtype:
        """Statistics are float32, or float64 for a float64 head."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def has_slope(self) -> bool:
        """Whether the derivative of a final logit with respect to the raw one differs from 1."""
        return bool(self.softcap) or self.inv_temperature != 1 or self.row_inv_temperature is not None

    def factors(self) -> list[tuple[slice, Tensor]]:
        """The matrices that make up the logits, each with the columns of the hidden states that it multiplies."""
        D = self.weight.shape[1]
        low_rank = [] if self.low_rank is None else [(slice(D, D + self.low_rank.shape[1]), self.low_rank)]
        return [(slice(0, D), self.weight), *low_rank]

    def to(self, dtype: torch.dtype) -> Self:
        """The head with its matrices in the dtype of the products, the small ones contiguous."""
        bias, low_rank = (None if x is None else x.to(dtype).contiguous() for x in (self.bias, self.low_rank))
        return self._replace(weight=self.weight.to(dtype), bias=bias, low_rank=low_rank)

    def of_rows(self, rows: Tensor | slice) -> Self:
        """The head as some rows see it: with their temperatures."""
        if self.row_inv_temperature is None:
            return self
        return self._replace(row_inv_temperature=self.row_inv_temperature[rows])


class Want(NamedTuple):
    """The optional statistics; ``logprob`` comes with a target, ``lse`` and the likeliest entry's always."""

    entropy: bool = False
    mean_logprob: bool = False
    argmax: bool = False
    varentropy: bool = False
    collision: bool = False
    entropy_drift: bool = False
    rank: bool = False
    top_k: int = 0  # 0: no top-k statistics
    top_p: float = 0.0  # 0: no nucleus
    open_nucleus: bool = False  # leave the crossing token out

    @property
    def ranking(self) -> bool:
        """Whether whole rows of logits are needed at a time."""
        return self.rank or bool(self.top_k) or bool(self.top_p)

    @property
    def first_moment(self) -> bool:
        """Whether sum u exp u is needed."""
        return self.entropy or self.varentropy or self.entropy_drift or bool(self.top_p)


def _empty() -> Tensor:
    return torch.empty(0)


@dataclass
class RowStats:
    """Statistics of N rows, each of shape [N]; a field that nobody asked for is empty, of shape [0].

    The backward pass takes log p_v as ``(z_v - max_logit) + max_logprob``; at large logits ``z_v - lse`` loses digits.
    A row's nucleus is the entries whose logit is at least ``nucleus_boundary``, which lies half way between the last
    one inside and the first one outside, so that a recomputation finds the same ones.
    """

    logprob: Tensor = field(default_factory=_empty)
    lse: Tensor = field(default_factory=_empty)
    max_logit: Tensor = field(default_factory=_empty)
    max_logprob: Tensor = field(default_factory=_empty)
    entropy: Tensor = field(default_factory=_empty)
    mean_logprob: Tensor = field(default_factory=_empty)
    varentropy: Tensor = field(default_factory=_empty)
    collision: Tensor = field(default_factory=_empty)
    entropy_drift: Tensor = field(default_factory=_empty)
    nucleus_entropy: Tensor = field(default_factory=_empty)
    nucleus_boundary: Tensor = field(default_factory=_empty)
    nucleus_log_mass: Tensor = field(default_factory=_empty)
    topk_entropy: Tensor = field(default_factory=_empty)
    topk_mass: Tensor = field(default_factory=_empty)
    skipped_mass: Tensor = field(default_factory=_empty)
    surviving_share: Tensor = field(default_factory=_empty)
    argmax: Tensor = field(default_factory=_empty)
    rank: Tensor = field(default_factory=_empty)

    @staticmethod
    def zeros(
        n: int, like: Tensor, dtype: torch.dtype, has_target: bool, want: Want, skips: bool = False
    ) -> "RowStats":
        """All-zero statistics of n rows on the device of ``like``."""

        def zeros(present: bool, dtype: torch.dtype = dtype) -> Tensor:
            return like.new_zeros(n if present else 0, dtype=dtype)

        nucleus, topk = want.top_p > 0, want.top_k > 0
        return RowStats(
            logprob=zeros(has_target),
            lse=zeros(True),
            max_logit=zeros(True),
            max_logprob=zeros(True),
            entropy=zeros(want.entropy or want.varentropy),
            mean_logprob=zeros(want.mean_logprob),
            varentropy=zeros(want.varentropy),
            collision=zeros(want.collision),
            entropy_drift=zeros(want.entropy_drift),
            nucleus_entropy=zeros(nucleus),
            nucleus_boundary=zeros(nucleus),
            nucleus_log_mass=zeros(nucleus),
            topk_entropy=zeros(topk),
            topk_mass=zeros(topk),
            skipped_mass=zeros(skips),
            surviving_share=zeros(skips),
            argmax=zeros(want.argmax, torch.int64),
            rank=zeros(want.rank, torch.int64),
        )

    def of_rows(self, rows: Tensor | slice) -> "RowStats":
        """The statistics of some rows."""
        return RowStats(*(value[rows] if len(value) else value for value in self.values()))

    def values(self) -> tuple[Tensor, ...]:
        """All fields in order, as an operator returns them."""
        return tuple(vars(self).values())

    def put(self, rows: Tensor | slice, block: "RowStats") -> None:
        """Write the statistics of a block of rows into these, those that both have."""
        for mine, theirs in zip(self.values(), block.values(), strict=True):
            if mine.numel() and theirs.numel():
                mine[rows] = theirs

    def zero_where(self, ignored: Tensor) -> None:
        """Set every field of the rows marked in ``ignored`` [N] to 0."""
        for value in self.values():
            if value.numel():
                value.masked_fill_(ignored, 0)

    def shifted_max_logprob(self, target: Tensor | None) -> Tensor:
        """``max_logprob`` with -inf in ignored rows: they have no statistics, and this makes their probabilities 0."""
        return self.max_logprob if target is None else self.max_logprob.masked_fill(target < 0, -math.inf)


class Cotangents(NamedTuple):
    """Gradients of a scalar with respect to the differentiable statistics, each [N] or None."""

    logprob: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    mean_logprob: Tensor | None = None
    varentropy: Tensor | None = None
    nucleus_entropy: Tensor | None = None

    def of_rows(self, rows: Tensor | slice) -> "Cotangents":
        """The cotangents of some rows."""
        return Cotangents(*(None if value is None else value[rows] for value in self))

    def zero_where(self, ignored: Tensor) -> "Cotangents":
        """The same with 0 in the rows marked in ``ignored`` [N]."""
        return Cotangents(*(None if value is None else value.masked_fill(ignored, 0) for value in self))

    def of_p(self, like: Tensor, mean_total: Tensor | None) -> Tensor:
        """The factor [N] of p_v in dz_v: ``g_lse - g_logprob - g_mean_logprob sum_v c_v``."""
        factor = torch.zeros_like(like) if self.lse is None else self.lse
        if self.logprob is not None:
            factor = factor - self.logprob
        if self.mean_logprob is not None:
            factor = factor - (self.mean_logprob if mean_total is None else self.mean_logprob * mean_total)
        return factor


class Gradients(NamedTuple):
    """Where the gradients go, None for those that nobody needs."""

    input: Tensor | None  # [N, D + R]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]
    low_rank: Tensor | None  # [V, R]

    def factors(self, head: Head) -> list[tuple[slice, Tensor]]:
        """The matrices among these, each with the columns of the hidden states that it multiplies."""
        matrices = (self.weight, self.low_rank)
        return [(columns, out) for (columns, _), out in zip(head.factors(), matrices, strict=False) if out is not None]


def loss_cotangents(
    row_weight: Tensor, nll_weight: Tensor | None, lse: Tensor, label_smoothing: float, z_loss: float
) -> Cotangents:
    """Gradients of ``sum_n row_weight_n row_loss_n`` (see ``row_losses``) for each statistic."""
    nll = row_weight if nll_weight is None else row_weight * nll_weight
    return Cotangents(
        logprob=(label_smoothing - 1) * nll,
        lse=2 * z_loss * row_weight * lse if z_loss else None,
        mean_logprob=-label_smoothing * row_weight if label_smoothing else None,
    )


def row_losses(stats: RowStats, nll_weight: Tensor | None, label_smoothing: float, z_loss: float) -> Tensor:
    """``(1 - s) w_y (-log p_y) + s sum_v c_v (-log p_v) + z_loss lse^2`` of each row, [N]; w_y is 1 if None."""
    nll = -stats.logprob if nll_weight is None else -nll_weight * stats.logprob
    losses = nll if not label_smoothing else (1 - label_smoothing) * nll - label_smoothing * stats.mean_logprob
    return losses + z_loss * stats.lse.square() if z_loss else losses
