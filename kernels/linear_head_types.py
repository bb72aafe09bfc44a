"""What every implementation of the linear head takes and returns.

Shape key: N rows, D width, V vocabulary; n and v are the sizes of a block.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["Cotangents", "Head", "RowStats", "Want", "loss_cotangents", "row_losses"]


@dataclass(frozen=True)
class Head:
    """A linear head and what it does to its logits: ``softcap tanh((h W^T + b) / softcap) * inv_temperature``."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    inv_temperature: float
    row_inv_temperature: Tensor | None  # [N], in place of the scalar
    softcap: float  # 0: none

    @property
    def stats_dtype(self) -> torch.dtype:
        """Statistics are float32, or float64 for a float64 head."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def has_slope(self) -> bool:
        """Whether the derivative of a final logit with respect to the raw one differs from 1."""
        return bool(self.softcap) or self.inv_temperature != 1 or self.row_inv_temperature is not None

    def row_scale(self, rows: Tensor | slice) -> Tensor | None:
        """Inverse temperatures of some rows, if each row has its own."""
        return None if self.row_inv_temperature is None else self.row_inv_temperature[rows]


@dataclass(frozen=True)
class Want:
    """The optional statistics; ``logprob`` comes with a target, ``lse`` and the likeliest entry's always."""

    entropy: bool = False
    mean_logprob: bool = False
    argmax: bool = False


@dataclass
class RowStats:
    """Statistics of N rows, each of shape [N]; a field that nobody asked for is empty, of shape [0].

    The backward pass takes log p_v as ``(z_v - max_logit) + max_logprob``; at large logits ``z_v - lse`` loses digits.
    """

    logprob: Tensor
    lse: Tensor
    max_logit: Tensor
    max_logprob: Tensor
    entropy: Tensor
    mean_logprob: Tensor
    argmax: Tensor

    @staticmethod
    def zeros(n: int, like: Tensor, dtype: torch.dtype, has_target: bool, want: Want) -> "RowStats":
        """All-zero statistics of n rows on the device of ``like``."""

        def field(present: bool, dtype: torch.dtype = dtype) -> Tensor:
            return like.new_zeros(n if present else 0, dtype=dtype)

        return RowStats(
            logprob=field(has_target),
            lse=field(True),
            max_logit=field(True),
            max_logprob=field(True),
            entropy=field(want.entropy),
            mean_logprob=field(want.mean_logprob),
            argmax=field(want.argmax, torch.int64),
        )

    def __getitem__(self, rows: Tensor | slice) -> "RowStats":
        """The statistics of some rows."""
        return RowStats(
            *(
                getattr(self, field.name)[rows] if len(getattr(self, field.name)) else getattr(self, field.name)
                for field in fields(self)
            )
        )

    def put(self, rows: Tensor | slice, block: "RowStats") -> None:
        """Write the statistics of a block of rows into these."""
        for field in fields(self):
            values = getattr(self, field.name)
            if values.numel():
                values[rows] = getattr(block, field.name)

    def zero_where(self, ignored: Tensor) -> None:
        """Set every field of the rows marked in ``ignored`` [N] to 0."""
        for field in fields(self):
            values = getattr(self, field.name)
            if values.numel():
                values.masked_fill_(ignored, 0)


@dataclass(frozen=True)
class Cotangents:
    """Gradients of a scalar with respect to the statistics, each [N] or None."""

    logprob: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    mean_logprob: Tensor | None = None

    def __getitem__(self, rows: Tensor | slice) -> "Cotangents":
        """The cotangents of some rows."""
        return Cotangents(
            *(None if (value := getattr(self, field.name)) is None else value[rows] for field in fields(self))
        )

    def zero_where(self, ignored: Tensor) -> "Cotangents":
        """The same with 0 in the rows marked in ``ignored`` [N]."""
        return Cotangents(
            *(
                None if (value := getattr(self, field.name)) is None else value.masked_fill(ignored, 0)
                for field in fields(self)
            )
        )

    def of_p(self, like: Tensor) -> Tensor:
        """The factor [N] in dz_v = p_v (factor - g_entropy (log p_v + H)) + g_logprob [v = y] + g_mean_logprob / V."""
        factor = torch.zeros_like(like) if self.lse is None else self.lse
        for cotangent in (self.logprob, self.mean_logprob):
            if cotangent is not None:
                factor = factor - cotangent
        return factor


def loss_cotangents(row_weight: Tensor, lse: Tensor, label_smoothing: float, z_loss: float) -> Cotangents:
    """Gradients of ``sum_n row_weight_n ((1 - s) nll + s mean_v(-log p_v) + z_loss lse^2)`` for each statistic."""
    return Cotangents(
        logprob=(label_smoothing - 1) * row_weight,
        lse=2 * z_loss * row_weight * lse if z_loss else None,
        mean_logprob=-label_smoothing * row_weight if label_smoothing else None,
    )


def row_losses(stats: RowStats, label_smoothing: float, z_loss: float) -> Tensor:
    """``(1 - s) nll + s mean_v(-log p_v) + z_loss lse^2`` of each row, [N]."""
    losses = (
        -stats.logprob
        if not label_smoothing
        else (label_smoothing - 1) * stats.logprob - label_smoothing * stats.mean_logprob
    )
    return losses + z_loss * stats.lse.square() if z_loss else losses
