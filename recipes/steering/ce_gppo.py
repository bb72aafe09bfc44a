"""CE-GPPO: a bounded gradient outside of the clip."""

import torch
from torch import Tensor

from litropy.recipes.steering.batch import UpdateBatch
from litropy.recipes.steering.slots import PolicyClip

__all__ = ["CEGPPO"]


class CEGPPO(PolicyClip):
    """``-r A`` inside of the clip; outside the ratio is replaced by the bound, with a gradient of that size.

    With sg(x) held constant::

        A < 0, r < 1 - low:    loss = -low_share (1 - low) r / sg(r) A
        A > 0, r > 1 + high:   loss = -high_share (1 + high) r / sg(r) A

    The first lowers the entropy, the second raises it.

    Args:
        low: how far the ratio may fall below 1, in (0, 1].
        high: how far it may rise above 1.
        low_share: beta_1, at least 0; the paper takes 0.75 for 7B and 0.5 for 1.5B parameters.
        high_share: beta_2, at least 0.
        dual: largest ratio that counts where the advantage is negative, above 1; None has no such bound. The authors'
            code, built on verl, has one.

    Raises:
        ValueError: if an option is out of its range.

    Reference: CE-GPPO (arXiv 2509.20712), gradient-preserving clipping.
    """

    def __init__(
        self,
        low: float = 0.2,
        high: float = 0.2,
        low_share: float = 0.75,
        high_share: float = 1.0,
        dual: float | None = None,
    ) -> None:
        if not 0 < low <= 1 or not high > 0:
            raise ValueError(f"`low` ({low}) must be in (0, 1], and `high` ({high}) above 0.")
        if low_share < 0 or high_share < 0:
            raise ValueError(f"`low_share` ({low_share}) and `high_share` ({high_share}) must be at least 0.")
        if dual is not None and not dual > 1:
            raise ValueError(f"`dual` is {dual}; it must be above 1, or null.")
        self.low, self.high, self.low_share, self.high_share, self.dual = low, high, low_share, high_share, dual

    def losses(self, batch: UpdateBatch) -> Tensor:
        """The loss of each token."""
        ratio, advantage = batch.ratio, batch.advantage
        plain, one = -ratio * advantage, ratio / ratio.detach()
        below = (advantage < 0) & (ratio < 1 - self.low)
        above = (advantage > 0) & (ratio > 1 + self.high)
        losses = torch.where(below, -self.low_share * (1 - self.low) * one * advantage, plain)
        losses = torch.where(above, -self.high_share * (1 + self.high) * one * advantage, losses)
        if self.dual is not None:
            losses = torch.where(advantage < 0, torch.minimum(losses, -self.dual * advantage), losses)
        return losses
