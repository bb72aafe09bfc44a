"""GSPO: one ratio a response."""

import torch
from torch import Tensor

from litropy.recipes.steering.batch import UpdateBatch, row_mean
from litropy.recipes.steering.ppo_clip import clipped_surrogate, outside_clip
from litropy.recipes.steering.slots import PolicyClip

__all__ = ["GSPO"]


class GSPO(PolicyClip):
    """Clips the geometric mean of a response's ratios: ``s_i = exp(mean_t log r_t)``.

    ``loss_t = max(-s A, -clip(s, 1 - low, 1 + high) A)``, whose gradient reaches every token of the response equally
    (the paper's token form, ``s_t = sg(s_i) pi_t / sg(pi_t)``). Goes with ``SequenceMean``.

    Args:
        low: how far s may fall below 1; far less than a token's ratio.
        high: how far it may rise above 1.

    Reference: GSPO (arXiv 2507.18071), equations 7 and 14.
    """

    def __init__(self, low: float = 3e-4, high: float = 4e-4) -> None:
        if not 0 < low <= 1 or not high > 0:
            raise ValueError(f"`low` ({low}) must be in (0, 1], and `high` ({high}) above 0.")
        self.low, self.high = low, high

    def _ratio(self, batch: UpdateBatch) -> Tensor:
        sequence = row_mean(batch.log_ratio.detach(), batch.mask).clamp(-20, 20)[:, None]
        return torch.exp(sequence + batch.logprob - batch.logprob.detach())

    def losses(self, batch: UpdateBatch) -> Tensor:
        """The clipped surrogate of the response's ratio, at each of its tokens."""
        return clipped_surrogate(self._ratio(batch), batch.advantage, self.low, self.high)

    def clipped(self, batch: UpdateBatch) -> Tensor:
        """Tokens of the responses whose ratio is outside."""
        return outside_clip(self._ratio(batch), batch.advantage, self.low, self.high)
