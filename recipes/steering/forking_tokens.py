"""Training on forking tokens only: the 80/20 rule."""

from torch import Tensor

from litropy.recipes.steering.batch import UpdateBatch
from litropy.recipes.steering.selection import largest_share
from litropy.recipes.steering.slots import TokenMask

__all__ = ["ForkingTokens"]


class ForkingTokens(TokenMask):
    """Keeps the tokens of the highest entropy: ``H_t >= tau``, the quantile above which a share of all tokens lies.

    The threshold is that of the whole mini-batch, and ties at it are kept. Means are taken over the kept tokens.

    Args:
        share: rho, of all tokens in the mini-batch, in (0, 1].
        renormalise: whether only kept tokens count in the denominator, as in the paper; false is how TRL does it.

    Raises:
        ValueError: if the share is out of its range.

    Reference: "Beyond the 80/20 Rule" (arXiv 2506.01939), equations 5 and 6.
    """

    def __init__(self, share: float = 0.2, renormalise: bool = True) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"`share` is {share}; it must be in (0, 1].")
        self.share, self.renormalise = share, renormalise

    def keep(self, batch: UpdateBatch) -> Tensor:
        """``H_t >= tau``."""
        return largest_share(batch.entropy, batch.mask, self.share)
