"""HAPO's adaptive temperature."""

from typing import Any

import torch
from torch import Tensor

from litropy.recipes.steering.batch import UpdateBatch
from litropy.recipes.steering.log_entropy import LogEntropyScale
from litropy.recipes.steering.sampler import Sampler, entropy_of

__all__ = ["AdaptiveTemperature"]


class AdaptiveTemperature(Sampler):
    """Draws uncertain tokens hotter, and certain ones colder: ``T_t = T (1 + strength h_t)``.

    h, from -1 to 1, is the log-entropy of the next token at temperature T, measured from the pivot of the latest
    mini-batch (``LogEntropyScale``); before the first one it is 0. The policy is trained at the temperatures drawn at,
    so that no mismatch is left to correct; the paper trains at T.

    Args:
        temperature: T.
        strength: tau, in [0, 1).
        quantile: of the pivot among all tokens of a mini-batch, in (0, 1).
        released: heat tokens below the pivot as well, as the sign of the authors' code has it.

    Raises:
        ValueError: if an option is out of its range.

    Reference: HAPO (arXiv 2509.16591), adaptive temperature sampling.
    """

    def __init__(
        self, temperature: float = 1.0, strength: float = 0.05, quantile: float = 0.8, released: bool = False
    ) -> None:
        super().__init__(temperature)
        if not 0 <= strength < 1 or not 0 < quantile < 1:
            raise ValueError(f"`strength` ({strength}) must be in [0, 1), and `quantile` ({quantile}) in (0, 1).")
        self.strength, self.quantile, self.released = strength, quantile, released
        self._scale: LogEntropyScale | None = None

    def temperatures(self, logits: Tensor) -> Tensor:
        """``T (1 + strength h)`` of each row."""
        fixed = super().temperatures(logits)
        if self._scale is None:
            return fixed
        entropy = entropy_of((logits / self.temperature).log_softmax(-1))
        scale = LogEntropyScale(**{k: v.to(logits) for k, v in vars(self._scale).items()})
        return fixed * (1 + self.strength * scale.measure(entropy, self.released))

    def after_step(self, batch: UpdateBatch) -> None:
        """Measure the mini-batch."""
        self._scale = LogEntropyScale.of(batch.entropy, batch.mask, self.quantile)

    def state_dict(self) -> dict[str, Any]:
        """Pivot and range."""
        return {} if self._scale is None else {name: float(value) for name, value in vars(self._scale).items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        loaded = {name: torch.tensor(value, dtype=torch.float64) for name, value in state_dict.items()}
        self._scale = LogEntropyScale(**loaded) if loaded else None
