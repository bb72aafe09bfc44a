"""Skywork's adaptive entropy coefficient."""

import torch
from torch import Tensor

from litropy.recipes.steering.controller import Controller

__all__ = ["SkyworkController"]


class SkyworkController(Controller):
    """A coefficient that goes up by a step below the target and down above it, and acts only below.

    ``I <- clip(I + step sign(H* - H), low, high)``; ``c = I`` if ``H <= H*``, else 0.

    Args:
        target: H* [nats]; None takes the entropy of the first mini-batch.
        step: what each optimiser step adds or takes.
        low: least coefficient.
        high: greatest coefficient.

    Reference: Skywork-OR1 (arXiv 2505.22312), section 4.2; its scripts' numbers. They step once a rollout, this once an
    optimiser step.
    """

    def __init__(self, target: float | None = 0.2, step: float = 1e-4, low: float = 0.0, high: float = 5e-3) -> None:
        super().__init__(target, low, high)
        if not step > 0:
            raise ValueError(f"`step` is {step}; it must be above 0.")
        self.step = step

    def increment(self, error: Tensor) -> Tensor:
        """One step towards the target."""
        return torch.where(error > 0, 1, -1).to(error.dtype) * self.step

    def coefficient(self, entropy: Tensor) -> Tensor:
        """The integral, while the entropy is not above the target."""
        return torch.where(self.error(entropy) >= 0, super().coefficient(entropy), 0).to(entropy.dtype)
