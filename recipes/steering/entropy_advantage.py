"""An advantage for uncertain tokens."""

import torch
from torch import Tensor

from litropy.recipes.steering.batch import UpdateBatch
from litropy.recipes.steering.slots import AdvantageShaping

__all__ = ["EntropyAdvantage"]


class EntropyAdvantage(AdvantageShaping):
    """``A_t + min(alpha H_t, |A_t| / kappa)``: uncertain tokens gain, by never more than a share of what is at stake.

    H is held constant: this changes how much is learned at a token, and is no entropy bonus. With kappa above 1 no
    advantage changes its sign.

    Args:
        alpha: per nat; the paper takes 0.4 with GRPO, and 0.1 with PPO.
        kappa: above 1.

    Raises:
        ValueError: if an option is out of its range.

    Reference: "Reasoning with Exploration: An Entropy Perspective" (arXiv 2506.14758), entropy-based
    advantage shaping.
    """

    def __init__(self, alpha: float = 0.4, kappa: float = 2.0) -> None:
        if alpha < 0 or not kappa > 1:
            raise ValueError(f"`alpha` ({alpha}) must be at least 0, and `kappa` ({kappa}) above 1.")
        self.alpha, self.kappa = alpha, kappa

    def shape(self, batch: UpdateBatch) -> Tensor:
        """The new advantages."""
        bonus = torch.minimum(self.alpha * batch.entropy, batch.advantage.abs() / self.kappa)
        return batch.advantage + bonus.clamp(min=0)
