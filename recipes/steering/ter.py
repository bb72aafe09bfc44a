"""TER: targeted entropy regularisation."""

from torch import Tensor

from litropy.recipes.steering.batch import UpdateBatch
from litropy.recipes.steering.slots import Regulariser

__all__ = ["TER"]


class TER(Regulariser):
    """``loss = c |mean H - H*|``: pushes the mean entropy of a mini-batch's tokens to a target, from both sides.

    Args:
        coefficient: c.
        target: H* [nats].

    Raises:
        ValueError: if an option is negative.

    Reference: Confucius3-Math (arXiv 2506.18330), targeted entropy regularisation.
    """

    def __init__(self, coefficient: float = 1e-3, target: float = 0.55) -> None:
        if coefficient < 0 or target < 0:
            raise ValueError(f"`coefficient` ({coefficient}) and `target` ({target}) must be at least 0.")
        self.coefficient, self.target = coefficient, target

    def loss(self, batch: UpdateBatch) -> Tensor:
        """``c |mean H - H*|``; 0 without tokens."""
        distance = (batch.token_mean(batch.entropy) - self.target).abs()
        return self.coefficient * distance * batch.mask.any()
