"""CISPO: clips the importance weight, never the gradient."""

from torch import Tensor

from litropy.recipes.steering.batch import UpdateBatch
from litropy.recipes.steering.slots import PolicyClip

__all__ = ["CISPO"]


class CISPO(PolicyClip):
    """REINFORCE with a clipped, constant importance weight: ``loss = -sg(clip(r, 1 - low, 1 + high)) A log pi``.

    Every token keeps a gradient, also rare ones at which PPO's clip would end it.

    Args:
        low: how far below 1 the weight may fall; 1 is no bound.
        high: how far above 1 it may rise.

    Reference: MiniMax-M1 (arXiv 2506.13585), equations 4 and 5.
    """

    def __init__(self, low: float = 1.0, high: float = 0.28) -> None:
        if not 0 < low <= 1 or not high > 0:
            raise ValueError(f"`low` ({low}) must be in (0, 1], and `high` ({high}) above 0.")
        self.low, self.high = low, high

    def losses(self, batch: UpdateBatch) -> Tensor:
        """``-sg(clip(r)) A log pi`` of each token."""
        return -batch.ratio.detach().clamp(1 - self.low, 1 + self.high) * batch.advantage * batch.logprob
