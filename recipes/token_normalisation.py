r"""Exact token means under gradient accumulation and across ranks.

The gradient of an optimiser step must be that of the mean over all of its targets, however these are spread over
micro-batches and ranks. With r ranks whose gradients are averaged, and sums over targets :math:`S_{ij}` of micro-batch
i on rank j with :math:`n_{ij}` targets::

    one micro-batch a step     loss_j = S_1j / c          c = sum_j n_1j / r
    k micro-batches a step     loss_ij = S_ij / c         Lightning divides each by k;
                               afterwards every gradient is multiplied by k c r / sum_ij n_ij

All of these are tensors on the device: nothing waits for it.
"""

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["TokenNormaliser", "sum_over_ranks"]


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place; without ranks it stays as it is."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


class TokenNormaliser:
    """Counts the targets of one optimiser step (a window of micro-batches).

    Args:
        ranks: number of data-parallel ranks.
    """

    def __init__(self, ranks: int = 1) -> None:
        self.ranks = ranks
        self._divisor: Tensor | None = None
        self._count: Tensor | None = None

    def divisor(self, num_targets: Tensor, first: bool) -> Tensor:
        """Count a micro-batch's targets and return what to divide its sum over targets by.

        Args:
            num_targets: this rank's number of targets in the micro-batch, an int64 scalar.
            first: whether the micro-batch is the first of its window.
        """
        if first or self._divisor is None or self._count is None:
            total = sum_over_ranks(num_targets.clone())
            # the divisor serves the whole window, so it must not be 0 if the first micro-batch has no target
            self._divisor = total.clamp(min=1) / self.ranks
            self._count = torch.zeros_like(num_targets)
        self._count += num_targets
        return self._divisor

    def correction(self, accumulated: int) -> Tensor:
        """Factor for the gradients of a whole window.

        Args:
            accumulated: what Lightning divided each micro-batch's loss by, ``accumulate_grad_batches``.
        """
        assert self._divisor is not None
        assert self._count is not None
        total = sum_over_ranks(self._count.clone()).clamp(min=1)
        return accumulated * self.ranks * self._divisor / total
