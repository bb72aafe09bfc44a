"""STEER: less weight for tokens whose update changes the entropy much."""

import math

import torch
from torch import Tensor

from litropy.recipes.steering.batch import UpdateBatch, stat
from litropy.recipes.steering.slots import TokenWeight

__all__ = ["STEER"]

_RELEASED_LEAST_MAXIMUM = 0.02


class STEER(TokenWeight):
    """``w_t = least^(|D_t| / max |D|)``, D_t the change of entropy that the token's update makes, to first order.

    Up to the learning rate, with ``p = pi_t`` and the ratio r::

        paper:    D = -r A p (1 - p) (log p + H)      only the token's own logit moves
        exact:    D = -r A (p (log p + H) - S2)       all logits move; S2 = sum_v p_v^2 (log p_v + H)

    The paper's form misses most of what an update of a rare token does. D = 0 where the clip stops the token.

    Args:
        least: lambda_min, the weight of the token that changes most, in (0, 1]; the authors' script has 0.8.
        exact: use the exact form; S2 comes from ``linear_head_stats`` (entropy_drift), without logits.
        released: use ``A (1 - p) (log p + H) r`` with H of the policy that wrote the response, stopped tokens included,
            and at least 0.02 for the maximum, as the authors' code does: rare tokens then stand out.

    Raises:
        ValueError: if the least weight is out of its range, or both forms are asked for.

    Reference: "Rethinking Entropy Interventions in RLVR" (arXiv 2510.10150), theorem 1; the exact form is this
    package's.
    """

    def __init__(self, least: float = 0.7, exact: bool = False, released: bool = False) -> None:
        if not 0 < least <= 1:
            raise ValueError(f"`least` is {least}; it must be in (0, 1].")
        if exact and released:
            raise ValueError("`exact` and `released` are two forms of the estimate; choose one.")
        self.least, self.exact, self.released = least, exact, released
        self.statistics = ("entropy_drift",) if exact else ()

    def change(self, batch: UpdateBatch) -> Tensor:
        """D of each token [R, T]; 0 outside of the mask."""
        entropy = stat(batch.rollouts.stats, "entropy") if self.released else batch.entropy
        surprise, probability = batch.logprob + entropy, batch.logprob.exp()
        if self.exact:
            slope = probability * surprise - stat(batch.current, "entropy_drift")
        else:
            slope = (1 - probability) * surprise * (1 if self.released else probability)
        moving = batch.mask if self.released or batch.clipped is None else batch.mask & ~batch.clipped
        return torch.where(moving, -batch.ratio * batch.advantage * slope, 0)

    def weights(self, batch: UpdateBatch) -> Tensor:
        """``least^(|D| / max |D|)``; 1 if no token changes anything."""
        size = self.change(batch).abs()
        most = size.amax() if size.numel() else size.new_zeros(())
        most = most.clamp(min=_RELEASED_LEAST_MAXIMUM if self.released else torch.finfo(size.dtype).tiny)
        return (math.log(self.least) * size / most).exp()
