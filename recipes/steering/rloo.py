"""RLOO's leave-one-out baseline."""

from torch import Tensor

from litropy.recipes.steering.batch import RolloutBatch
from litropy.recipes.steering.slots import Advantage

__all__ = ["RLOO"]


class RLOO(Advantage):
    """Rewards against the mean of the group's others: ``A_i = R_i - mean_{j != i} R_j = G / (G - 1) (R_i - mean R)``.

    Reference: "Back to Basics" (arXiv 2402.14740), equation 7.
    """

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """``G / (G - 1) (R_i - mean)``, [R, 1]."""
        return (batch.bessel() * batch.centred_reward())[:, None]
