"""A mean over all tokens of all batches and ranks."""

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["TokenMean"]


class TokenMean(Metric):
    """Mean of a quantity over tokens: the sum of sums over the sum of counts, across batches and ranks.

    Example::

        >>> mean = TokenMean()
        >>> mean.update(torch.tensor(6.0), torch.tensor(3))
        >>> mean.update(torch.tensor(4.0), torch.tensor(1))
        >>> mean.compute()
        tensor(2.5000)
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor) -> None:
        """Add a batch.

        Args:
            total: sum of the quantity over the batch's tokens, a scalar.
            count: number of those tokens, an int64 scalar.
        """
        # not in place: half-precision training casts the state, and the sum must be float32 nevertheless
        self.total = self.total + total.detach().float()
        self.count = self.count + count

    def compute(self) -> Tensor:
        """The mean; NaN without tokens."""
        return self.total / self.count
