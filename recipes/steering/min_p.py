"""Min-p sampling."""

import math

from torch import Tensor

from litropy.recipes.steering.sampler import TruncatingSampler, chances_from

__all__ = ["MinP"]


class MinP(TruncatingSampler):
    """Leaves out tokens less likely than a share of the likeliest: ``p_v < min_p max p``.

    Args:
        min_p: the share, in (0, 1].
        temperature: of the softmax, taken before.

    Raises:
        ValueError: if an option is out of its range.

    Reference: "Turning Up the Heat" (arXiv 2407.01082), section 3.
    """

    def __init__(self, min_p: float = 0.1, temperature: float = 1.0) -> None:
        super().__init__(temperature)
        if not 0 < min_p <= 1:
            raise ValueError(f"`min_p` is {min_p}; it must be in (0, 1].")
        self.min_p = min_p

    def chances(self, policy: Tensor) -> tuple[Tensor, None]:
        """Keep ``log p_v >= max log p + log min_p``."""
        # the likeliest is never below the bound
        return chances_from(policy, policy.amax(-1) + math.log(self.min_p)), None
