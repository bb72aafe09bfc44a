"""Corrections for tokens that were not drawn from the policy: truncated and masked importance sampling."""

from typing import Literal

import torch
from torch import Tensor

from litropy.recipes.steering.batch import UpdateBatch
from litropy.recipes.steering.slots import Mismatch

__all__ = ["MaskedImportance", "TruncatedImportance", "importance_ratio"]

Level = Literal["token", "sequence"]


def importance_ratio(batch: UpdateBatch, level: Level) -> Tensor:
    """``pi_old / mu`` of each token [R, T], or of its whole response; mu is what the tokens were drawn from."""
    log_ratio = torch.where(batch.mask, batch.old - batch.rollouts.behaviour, 0)
    if level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(log_ratio)
    return log_ratio.clamp(-20, 20).exp()


def _check_level(level: str) -> None:
    if level not in ("token", "sequence"):
        raise ValueError(f"`level` is {level!r}; choose 'token' or 'sequence'.")


class TruncatedImportance(Mismatch):
    """TIS: ``w = min(pi_old / mu, cap)``.

    Args:
        cap: the largest weight.
        level: of the ratio: each token's, or the product over the response.

    Raises:
        ValueError: if an option is out of its range.

    Reference: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    """

    def __init__(self, cap: float = 2.0, level: Level = "token") -> None:
        _check_level(level)
        if not cap > 0:
            raise ValueError(f"`cap` is {cap}; it must be above 0.")
        self.cap, self.level = cap, level

    def weights(self, batch: UpdateBatch) -> Tensor:
        """``min(pi_old / mu, cap)``."""
        return importance_ratio(batch, self.level).clamp(max=self.cap)


class MaskedImportance(Mismatch):
    """MIS: ``w = pi_old / mu`` where that is within [low, high], else 0.

    Args:
        low: the smallest ratio that counts.
        high: the largest.
        level: of the ratio: each token's, or the product over the response.

    Raises:
        ValueError: if an option is out of its range.

    Reference: IcePop (Ring-1T, arXiv 2510.18855), equation 3, for tokens.
    """

    def __init__(self, low: float = 0.5, high: float = 2.0, level: Level = "token") -> None:
        _check_level(level)
        if not 0 <= low < high:
            raise ValueError(f"`low` ({low}) must be at least 0 and below `high` ({high}).")
        self.low, self.high, self.level = low, high, level

    def weights(self, batch: UpdateBatch) -> Tensor:
        """``pi_old / mu`` inside the band, 0 outside."""
        ratio = importance_ratio(batch, self.level)
        return torch.where((ratio >= self.low) & (ratio <= self.high), ratio, 0)
