"""HAPO's differential advantage redistribution."""

import torch
from torch import Tensor

from litropy.recipes.steering.batch import UpdateBatch
from litropy.recipes.steering.log_entropy import LogEntropyScale
from litropy.recipes.steering.slots import TokenWeight

__all__ = ["AdvantageRedistribution"]


class AdvantageRedistribution(TokenWeight):
    """``1 + strength h_t`` for uncertain tokens that the update moves, and for certain ones that it does not; else 1.

    h, from -1 to 1, is the token's log-entropy measured from the pivot of the mini-batch (``LogEntropyScale``). A token
    is moved if its ratio is outside of (1 - low / 2, 1 + high / 2).

    Args:
        strength: beta, in [0, 1].
        low: half of this is how far below 1 the ratio of a token at rest may be.
        high: half of this is how far above.
        quantile: of the pivot among all tokens, in (0, 1).
        released: count tokens below the pivot as uncertain, as the sign of the authors' code has it.

    Raises:
        ValueError: if an option is out of its range.

    Reference: HAPO (arXiv 2509.16591), differential advantage redistribution.
    """

    def __init__(
        self,
        strength: float = 1.0,
        low: float = 0.2,
        high: float = 0.2,
        quantile: float = 0.8,
        released: bool = False,
    ) -> None:
        if not 0 <= strength <= 1 or not 0 < quantile < 1:
            raise ValueError(f"`strength` ({strength}) must be in [0, 1], and `quantile` ({quantile}) in (0, 1).")
        if not 0 < low <= 1 or not high > 0:
            raise ValueError(f"`low` ({low}) must be in (0, 1], and `high` ({high}) above 0.")
        self.strength, self.low, self.high, self.quantile, self.released = strength, low, high, quantile, released

    def weights(self, batch: UpdateBatch) -> Tensor:
        """``1 + strength h`` or 1."""
        scale = LogEntropyScale.of(batch.entropy, batch.mask, self.quantile)
        measure = scale.measure(batch.entropy, self.released)
        moved = (batch.ratio < 1 - self.low / 2) | (batch.ratio > 1 + self.high / 2)
        return torch.where((measure > 0) == moved, 1 + self.strength * measure, 1)
