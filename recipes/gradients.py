"""Norm, scaling and clipping of all gradients at once, whole or sharded, without waiting for the device."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from litropy.recipes.token_normalisation import sum_over_ranks

__all__ = ["Gradients"]


class Gradients:
    """The gradients of some parameters; under FSDP2 this rank's shards of them.

    Args:
        parameters: those without a gradient are left out.

    Example::

        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> gradients = Gradients([weight])
        >>> gradients.norm()
        tensor(5.)
        >>> gradients.clip(1.0)
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        found = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self.sharded = any(isinstance(gradient, DTensor) for gradient in found)
        self.tensors = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in found]
        self._norm: Tensor | None = None

    def norm(self) -> Tensor:
        """Euclidean norm over all parameters and shards, float32; computed once."""
        if self._norm is None:
            square = torch.stack(torch._foreach_norm(self.tensors, 2, torch.float32)).square().sum()
            self._norm = (sum_over_ranks(square) if self.sharded else square).sqrt()
        return self._norm

    def scale(self, factor: Tensor) -> None:
        """Multiply every gradient by a scalar tensor, in place."""
        if self.tensors:
            torch._foreach_mul_(self.tensors, factor)
            self._norm = None

    def clip(self, max_norm: float) -> None:
        """Scale the gradients down so that their norm is at most ``max_norm``."""
        if self.tensors:
            self.scale((max_norm / (self.norm() + 1e-6)).clamp(max=1.0))

    def clamp(self, limit: float) -> None:
        """Bound every single entry by ``limit`` in magnitude."""
        for gradient in self.tensors:
            gradient.clamp_(-limit, limit)
