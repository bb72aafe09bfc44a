"""Controllers: a coefficient that follows the entropy it is to hold."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from litropy.recipes.steering.batch import UpdateBatch
from litropy.recipes.steering.slots import Component

__all__ = ["Controller"]


class Controller(Component, ABC):
    r"""A coefficient with memory: ``c = clip(P(e) + I, low, high)``, ``I <- I + increment(e)``, with ``e = H* - H``.

    H is the mean entropy of a mini-batch over all its tokens and ranks. Anti-windup: the increment never carries P + I
    further outside of [low, high], so that the coefficient turns at once when the error does.

    Args:
        target: H* [nats]; None takes the entropy of the first mini-batch, an anchor.
        low: least coefficient.
        high: greatest coefficient.

    Raises:
        ValueError: if low is above high, or the target is negative.
    """

    def __init__(self, target: float | None, low: float, high: float) -> None:
        if low > high:
            raise ValueError(f"`low` ({low}) is above `high` ({high}).")
        if target is not None and target < 0:
            raise ValueError(f"`target` is {target}; an entropy is at least 0 nats.")
        self.target, self.low, self.high = target, low, high
        self._anchor: Tensor | None = None
        self._integral: Tensor | None = None

    def proportional(self, error: Tensor) -> Tensor:
        """The part of the coefficient that follows the error at once."""
        return torch.zeros_like(error)

    @abstractmethod
    def increment(self, error: Tensor) -> Tensor:
        """What a step adds to the coefficient for good."""

    def error(self, entropy: Tensor) -> Tensor:
        """``H* - H``, float64: a constant may be far larger than what a step adds to it."""
        entropy = entropy.detach().double()
        if self.target is not None:
            return self.target - entropy
        if self._anchor is None:
            self._anchor = entropy.clone()
        return self._anchor.to(entropy.device) - entropy

    def coefficient(self, entropy: Tensor) -> Tensor:
        """The coefficient at a mean entropy, a scalar without gradient."""
        error = self.error(entropy)
        return (self.proportional(error) + self._integrated(error)).clamp(self.low, self.high).to(entropy.dtype)

    def update(self, entropy: Tensor) -> None:
        """Take a step: move the integral."""
        error = self.error(entropy)
        proportional, integral = self.proportional(error), self._integrated(error)
        moved = integral + self.increment(error)
        least = torch.minimum(self.low - proportional, integral)
        most = torch.maximum(self.high - proportional, integral)
        self._integral = torch.minimum(torch.maximum(moved, least), most)

    def after_step(self, batch: UpdateBatch) -> None:
        """Take a step with the mini-batch's entropy."""
        self.update(batch.token_mean(batch.entropy))

    def _integrated(self, error: Tensor) -> Tensor:
        return torch.zeros_like(error) if self._integral is None else self._integral.to(error.device)

    def state_dict(self) -> dict[str, Any]:
        """Integral and anchor, as numbers."""
        values = {"integral": self._integral, "anchor": self._anchor}
        return {name: float(value) for name, value in values.items() if value is not None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        loaded = {name: torch.tensor(value, dtype=torch.float64) for name, value in state_dict.items()}
        self._integral, self._anchor = loaded.get("integral"), loaded.get("anchor")
