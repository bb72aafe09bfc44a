"""PPO's clipped surrogate, with clip-higher and dual clip."""

import torch
from torch import Tensor

from litropy.recipes.steering.batch import UpdateBatch
from litropy.recipes.steering.slots import PolicyClip

__all__ = ["PPOClip", "clipped_surrogate", "outside_clip"]

Bound = float | Tensor


def clipped_surrogate(ratio: Tensor, advantage: Tensor, low: Bound, high: Bound, dual: float | None = None) -> Tensor:
    """``max(-r A, -clip(r, 1 - low, 1 + high) A)``; where A < 0, at most ``-dual A``.

    Args:
        ratio: r, the new over the old probability.
        advantage: A, of the same shape.
        low: how far below 1 the ratio counts; a number, or one a token.
        high: how far above 1.
        dual: c > 1, the largest ratio that counts where A < 0.

    Example::

        >>> clipped_surrogate(torch.tensor([1.5, 1.5, 4.0]), torch.tensor([1.0, -1.0, -1.0]), 0.2, 0.2, dual=3.0)
        tensor([-1.2000,  1.5000,  3.0000])
    """
    bounded = ratio.clamp(min=1 - low).clamp(max=1 + high)
    losses = torch.maximum(-ratio * advantage, -bounded * advantage)
    if dual is not None:
        losses = torch.where(advantage < 0, torch.minimum(losses, -dual * advantage), losses)
    return losses


def outside_clip(ratio: Tensor, advantage: Tensor, low: Bound, high: Bound, dual: float | None = None) -> Tensor:
    """Which tokens have no gradient in ``clipped_surrogate``, bool."""
    outside = ((advantage > 0) & (ratio > 1 + high)) | ((advantage < 0) & (ratio < 1 - low))
    return outside if dual is None else outside | ((advantage < 0) & (ratio > dual))


class PPOClip(PolicyClip):
    """PPO's clipped surrogate; ``high`` above ``low`` is DAPO's clip-higher, ``dual`` the dual clip.

    ``loss = max(-r A, -clip(r, 1 - low, 1 + high) A)``, and where A < 0 at most ``-dual A``.

    Args:
        low: how far the ratio may fall below 1, in (0, 1].
        high: how far it may rise above 1; DAPO takes 0.28.
        dual: largest ratio that counts where the advantage is negative, above 1; None has no such bound. DAPO's and
            verl's scripts take 10 and 3.

    Raises:
        ValueError: if a bound is out of its range.

    Reference: PPO (arXiv 1707.06347), equation 7; DAPO (arXiv 2503.14476), equation 8; dual clip (arXiv 1912.09729),
    equation 5.
    """

    def __init__(self, low: float = 0.2, high: float = 0.2, dual: float | None = None) -> None:
        if not 0 < low <= 1 or not high > 0:
            raise ValueError(f"`low` ({low}) must be in (0, 1], and `high` ({high}) above 0.")
        if dual is not None and not dual > 1:
            raise ValueError(f"`dual` is {dual}; it must be above 1, or null.")
        self.low, self.high, self.dual = low, high, dual

    def losses(self, batch: UpdateBatch) -> Tensor:
        """The clipped surrogate of each token."""
        return clipped_surrogate(batch.ratio, batch.advantage, self.low, self.high, self.dual)

    def clipped(self, batch: UpdateBatch) -> Tensor:
        """Tokens whose ratio is outside, on the side that its advantage pulls to."""
        return outside_clip(batch.ratio, batch.advantage, self.low, self.high, self.dual)
