"""PSHW: harder prompts weigh more."""

from torch import Tensor

from litropy.recipes.steering.batch import RolloutBatch
from litropy.recipes.steering.slots import Advantage

__all__ = ["PSHW"]


class PSHW(Advantage):
    """Policy-specific hardness weighting: ``A_i = (R_i - mu) (slope mu + offset)``, mu the mean reward of the group.

    Rewards are taken from [low, high] to [-1, 1] first. The weight falls from 1.51 where no response is right to 1
    where all are. The paper adds tokens up without dividing by the length (``SequenceSum``).

    Args:
        slope: alpha.
        offset: weight at mu = 0.
        low: least reward.
        high: greatest reward.

    Raises:
        ValueError: if low is not below high.

    Reference: Confucius3-Math (arXiv 2506.18330), policy-specific hardness weighting.
    """

    def __init__(self, slope: float = -0.256, offset: float = 1.256, low: float = 0.0, high: float = 1.0) -> None:
        if not low < high:
            raise ValueError(f"`low` ({low}) must be below `high` ({high}).")
        self.slope, self.offset, self.low, self.high = slope, offset, low, high

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """``(R_i - mu) (slope mu + offset)``, [R, 1]."""
        scale = 2 / (self.high - self.low)
        mean = (batch.group_mean(batch.reward) - self.low) * scale - 1
        return (batch.centred_reward() * scale * (self.slope * mean + self.offset))[:, None]
