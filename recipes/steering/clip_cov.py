"""Clip-Cov: no gradient for a few tokens that would lower the entropy most."""

from typing import Any

import torch
from torch import Tensor

from litropy.recipes.steering.batch import UpdateBatch
from litropy.recipes.steering.selection import covariance, first_tokens, steady
from litropy.recipes.steering.slots import TokenMask

__all__ = ["ClipCov"]


class ClipCov(TokenMask):
    """Leaves out ``max(1, floor(share N))`` of N tokens, drawn from those whose covariance is within a band.

    ``Cov_t = (log pi_t - mean log pi) (A_t - mean A)``, the means over the mini-batch. Tokens that the clip has stopped
    already are not drawn; those left out still count in the denominator.

    Args:
        share: r, of all tokens, in (0, 1].
        low: least covariance of a candidate.
        high: greatest covariance of a candidate.
        seed: of the draw.

    Raises:
        ValueError: if an option is out of its range.

    Reference: "The Entropy Mechanism of RL for Reasoning LLMs" (arXiv 2505.22617), equations 9 and 10.
    """

    def __init__(self, share: float = 2e-4, low: float = 1.0, high: float = 5.0, seed: int = 0) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"`share` is {share}; it must be in (0, 1].")
        if not low < high:
            raise ValueError(f"`low` ({low}) must be below `high` ({high}).")
        self.share, self.low, self.high, self.seed = share, low, high, seed
        self._step = 0

    def keep(self, batch: UpdateBatch) -> Tensor:
        """All but the drawn tokens."""
        found = steady(covariance(batch.logprob, batch.advantage, batch.mask))
        candidates = batch.mask & (found > self.low) & (found < self.high)
        if batch.clipped is not None:
            candidates = candidates & ~batch.clipped
        # one number for each place of the mini-batch, the same on every rank and in a resumed run
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._step)
        order = torch.rand(found.shape, generator=generator).to(found.device)
        count = (batch.mask.sum().double() * self.share).floor().clamp(min=1)
        return batch.mask & ~first_tokens(order, candidates, count)

    def after_step(self, batch: UpdateBatch) -> None:
        """Draw anew in the next step."""
        self._step += 1

    def state_dict(self) -> dict[str, Any]:
        """How many steps have drawn."""
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        self._step = state_dict["step"]
