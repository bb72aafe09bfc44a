"""How the tokens' losses add up: the four conventions of the field."""

import torch
from torch import Tensor

from litropy.recipes.steering.slots import Aggregation

__all__ = ["ConstantLength", "SequenceMean", "SequenceSum", "TokenMean"]


class TokenMean(Aggregation):
    """Mean over all tokens of the mini-batch: ``1 / sum_i |o_i|`` each, long responses counting more.

    Reference: DAPO (arXiv 2503.14476), equation 8.

    Example::

        >>> TokenMean().shares(torch.tensor([[True, True], [True, False]]))
        tensor([[0.3333, 0.3333],
                [0.3333, 0.0000]])
    """

    def shares(self, mask: Tensor) -> Tensor:
        """``1 / N`` for each of N tokens."""
        return mask / mask.sum().clamp(min=1)


class SequenceMean(Aggregation):
    """Mean over responses of the means over their tokens: ``1 / (R |o_i|)`` each.

    Reference: GRPO (arXiv 2402.03300), equation 3.
    """

    def shares(self, mask: Tensor) -> Tensor:
        """``1 / (R |o_i|)`` for each token of response i of R."""
        return mask / (mask.sum(-1, keepdim=True).clamp(min=1) * max(1, len(mask)))


class SequenceSum(Aggregation):
    """Mean over responses of the sums over their tokens: ``1 / R`` each.

    Reference: REINFORCE (Williams 1992): the log-probability of a response is the sum over its tokens.
    """

    def shares(self, mask: Tensor) -> Tensor:
        """``1 / R`` for each token."""
        return mask / torch.full_like(mask[:1, :1], max(1, len(mask)), dtype=torch.float32)


class ConstantLength(Aggregation):
    """Mean over responses of the sums over their tokens, divided by a constant: ``1 / (R L)`` each.

    Args:
        length: L, the constant, such as the most tokens a response may have.

    Reference: Dr. GRPO (arXiv 2503.20783), section 3.2 and listing 1.
    """

    def __init__(self, length: float) -> None:
        if not length > 0:
            raise ValueError(f"`length` is {length}; it must be a positive number of tokens.")
        self.length = length

    def shares(self, mask: Tensor) -> Tensor:
        """``1 / (R L)`` for each token."""
        return mask / torch.full_like(mask[:1, :1], max(1, len(mask)) * self.length, dtype=torch.float32)
