"""Dr. GRPO's advantage: no division by the standard deviation."""

from torch import Tensor

from litropy.recipes.steering.batch import RolloutBatch
from litropy.recipes.steering.slots import Advantage

__all__ = ["DrGRPO"]


class DrGRPO(Advantage):
    """Rewards centred within each prompt's group: ``A_i = R_i - mean R``.

    GRPO's division favours prompts that are nearly solved or nearly hopeless; the paper goes with ``ConstantLength``.

    Reference: "Understanding R1-Zero-Like Training" (arXiv 2503.20783), section 3.2.
    """

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """``R_i - mean``, [R, 1]."""
        return batch.centred_reward()[:, None]
