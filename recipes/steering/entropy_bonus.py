"""The entropy bonus, with a fixed coefficient or a controller's."""

from typing import Any

from torch import Tensor

from litropy.recipes.steering.batch import UpdateBatch
from litropy.recipes.steering.controller import Controller
from litropy.recipes.steering.slots import Regulariser

__all__ = ["EntropyBonus"]


class EntropyBonus(Regulariser):
    """``loss = -c mean H``, the mean over all tokens of the mini-batch.

    Args:
        coefficient: c, if nothing controls it. At 1e-2 runs with large vocabularies explode, at 1e-4 nothing happens.
        controller: sets c by the entropy it finds.

    Raises:
        ValueError: if both are given, or neither.

    Reference: Williams and Peng 1991; A3C (arXiv 1602.01783), section 4.
    """

    def __init__(self, coefficient: float | None = None, controller: Controller | None = None) -> None:
        if (coefficient is None) == (controller is None):
            raise ValueError("Give either `coefficient` or `controller`, and not both.")
        self.coefficient, self.controller = coefficient, controller

    def loss(self, batch: UpdateBatch) -> Tensor:
        """``-c mean H``."""
        entropy = batch.token_mean(batch.entropy)
        if self.controller is not None:
            return -self.controller.coefficient(entropy.detach()) * entropy
        assert self.coefficient is not None
        return -self.coefficient * entropy

    def after_step(self, batch: UpdateBatch) -> None:
        """Let the controller take its step."""
        if self.controller is not None:
            self.controller.after_step(batch)

    def state_dict(self) -> dict[str, Any]:
        """The controller's state."""
        return {} if self.controller is None else self.controller.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        if self.controller is not None:
            self.controller.load_state_dict(state_dict)
