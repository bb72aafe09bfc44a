"""HAPO's token-level group average."""

import torch
from torch import Tensor

from litropy.recipes.steering.batch import RolloutBatch
from litropy.recipes.steering.grpo import GRPO
from litropy.recipes.steering.slots import Advantage

__all__ = ["TokenGroupAverage"]


class TokenGroupAverage(Advantage):
    """``A_i = (R_i - mu) / (sigma + eps)``, mu and sigma over the tokens of the group, each with its response's reward.

    Long responses count more, so that the advantages of a group's tokens sum to 0. A group in which one reaches the
    bound has GRPO's advantages instead; so has one without tokens.

    Args:
        bound: size of an advantage from which on a group falls back.
        eps: added to the standard deviation, which is divided by the number of tokens.

    Raises:
        ValueError: if the bound is not positive.

    Reference: HAPO (arXiv 2509.16591), token-level group average; the bound is that of the authors' code.
    """

    def __init__(self, bound: float = 5.0, eps: float = 1e-6) -> None:
        if not bound > 0:
            raise ValueError(f"`bound` is {bound}; it must be above 0.")
        self.bound, self.eps = bound, eps

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """``(R_i - mu) / (sigma + eps)``, [R, 1]."""
        index, count = batch.group_index()
        length = batch.lengths.to(batch.reward.dtype)

        def over_tokens(values: Tensor) -> Tensor:
            total = values.new_zeros(2, len(count)).index_add(1, index, torch.stack([length * values, length]))
            return (total[0] / total[1].clamp(min=1))[index]

        centred = torch.where(batch.equal_rewards(), 0, batch.reward - over_tokens(batch.reward))
        found = centred / (over_tokens(centred.square()).sqrt() + self.eps)
        large = found.abs() >= self.bound
        falls_back = batch.group_mean(large.to(found.dtype)) > 0
        return torch.where(falls_back, GRPO(self.eps).advantages(batch)[:, 0], found)[:, None]
