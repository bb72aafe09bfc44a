"""GRPO's group-relative advantage."""

from torch import Tensor

from litropy.recipes.steering.batch import RolloutBatch
from litropy.recipes.steering.slots import Advantage

__all__ = ["GRPO"]


class GRPO(Advantage):
    """Rewards centred and scaled within each prompt's group: ``A_i = (R_i - mean R) / (std R + eps)``.

    The standard deviation is the sample's (divided by G - 1). A group of equal rewards has advantage 0.

    Args:
        eps: added to the standard deviation.

    Reference: DeepSeekMath (arXiv 2402.03300), section 4.1.2.
    """

    def __init__(self, eps: float = 1e-6) -> None:
        self.eps = eps

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """``(R_i - mean) / (std + eps)``, [R, 1]."""
        centred = batch.centred_reward()
        variance = batch.group_mean(centred.square()) * batch.bessel()
        return (centred / (variance.sqrt() + self.eps))[:, None]
