"""A proportional-integral controller of the entropy."""

from torch import Tensor

from litropy.recipes.steering.controller import Controller

__all__ = ["PIController"]


class PIController(Controller):
    """``c = clip(K_p e + K_i sum e, low, high)`` with ``e = H* - H``: holds a target without a lasting error.

    Args:
        target: H* [nats]; None takes the entropy of the first mini-batch, an anchor.
        proportional_gain: K_p, per nat.
        integral_gain: K_i, per nat and step; 0 is a plain anchor.
        low: least coefficient; negative ones push the entropy down.
        high: greatest coefficient.

    Raises:
        ValueError: if a gain is negative.

    Example::

        >>> import torch
        >>> controller = PIController(target=1.0, proportional_gain=0.1, integral_gain=0.01)
        >>> controller.coefficient(torch.tensor(0.5))
        tensor(0.0500)
        >>> controller.update(torch.tensor(0.5))
        >>> controller.coefficient(torch.tensor(0.5))
        tensor(0.0550)

    Reference: after EntroPIC (arXiv 2511.15248), whose controller weights tokens; here the entropy bonus.
    """

    def __init__(
        self,
        target: float | None = 0.5,
        proportional_gain: float = 0.1,
        integral_gain: float = 0.01,
        low: float = -0.2,
        high: float = 0.2,
    ) -> None:
        super().__init__(target, low, high)
        if proportional_gain < 0 or integral_gain < 0:
            raise ValueError(f"The gains ({proportional_gain}, {integral_gain}) must be at least 0.")
        self.proportional_gain, self.integral_gain = proportional_gain, integral_gain

    def proportional(self, error: Tensor) -> Tensor:
        """``K_p e``."""
        return self.proportional_gain * error

    def increment(self, error: Tensor) -> Tensor:
        """``K_i e``."""
        return self.integral_gain * error
