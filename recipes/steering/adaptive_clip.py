"""HAPO's asymmetric adaptive clipping."""

from torch import Tensor

from litropy.recipes.steering.batch import UpdateBatch
from litropy.recipes.steering.log_entropy import LogEntropyScale
from litropy.recipes.steering.ppo_clip import clipped_surrogate, outside_clip
from litropy.recipes.steering.slots import PolicyClip

__all__ = ["AdaptiveClip"]


class AdaptiveClip(PolicyClip):
    """PPO's clip, with bounds for each token: certain ones may become rarer, uncertain ones likelier.

    With h, from -1 to 1, the token's log-entropy measured from the pivot of the mini-batch (``LogEntropyScale``)::

        low_t = low (1 - strength min(h, 0))        high_t = high (1 + strength max(h, 0))

    Args:
        low: how far the ratio may fall below 1 at the pivot, in (0, 1].
        high: how far it may rise above 1 at the pivot.
        strength: alpha, at least 0; at 1 the bounds go up to twice as far.
        dual: largest ratio that counts where the advantage is negative, above 1; None has no such bound.
        quantile: of the pivot among all tokens, in (0, 1).
        released: take tokens below the pivot for uncertain ones, as the sign of the authors' code has it.

    Raises:
        ValueError: if an option is out of its range.

    Reference: HAPO (arXiv 2509.16591), asymmetric adaptive clipping.
    """

    def __init__(
        self,
        low: float = 0.2,
        high: float = 0.2,
        strength: float = 1.0,
        dual: float | None = 10.0,
        quantile: float = 0.8,
        released: bool = False,
    ) -> None:
        if not low > 0 or not high > 0 or strength < 0:
            raise ValueError(f"`low` ({low}) and `high` ({high}) must be above 0, `strength` ({strength}) at least 0.")
        if low * (1 + strength) > 1:
            raise ValueError(f"`low` ({low}) times 1 + `strength` ({strength}) is above 1; no ratio is below 0.")
        if dual is not None and not dual > 1:
            raise ValueError(f"`dual` is {dual}; it must be above 1, or null.")
        if not 0 < quantile < 1:
            raise ValueError(f"`quantile` is {quantile}; it must be in (0, 1).")
        self.low, self.high, self.strength, self.dual = low, high, strength, dual
        self.quantile, self.released = quantile, released

    def bounds(self, batch: UpdateBatch) -> tuple[Tensor, Tensor]:
        """``low_t`` and ``high_t`` of each token, [R, T] each, without gradient."""
        scale = LogEntropyScale.of(batch.entropy, batch.mask, self.quantile)
        measure = scale.measure(batch.entropy, self.released)
        low = self.low * (1 - self.strength * measure.clamp(max=0))
        return low, self.high * (1 + self.strength * measure.clamp(min=0))

    def losses(self, batch: UpdateBatch) -> Tensor:
        """The clipped surrogate of each token."""
        return clipped_surrogate(batch.ratio, batch.advantage, *self.bounds(batch), self.dual)

    def clipped(self, batch: UpdateBatch) -> Tensor:
        """Tokens whose ratio is outside, on the side that its advantage pulls to."""
        return outside_clip(batch.ratio, batch.advantage, *self.bounds(batch), self.dual)
