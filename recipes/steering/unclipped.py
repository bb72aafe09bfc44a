"""The policy gradient with importance sampling and no clip."""

from torch import Tensor

from litropy.recipes.steering.batch import UpdateBatch
from litropy.recipes.steering.slots import PolicyClip

__all__ = ["Unclipped"]


class Unclipped(PolicyClip):
    """``loss = -r A``: what KL-Cov is built on, which bounds the chosen tokens' change by its penalty alone.

    Reference: Sutton et al. 2000, with importance sampling.
    """

    def losses(self, batch: UpdateBatch) -> Tensor:
        """``-r A`` of each token."""
        return -batch.ratio * batch.advantage
