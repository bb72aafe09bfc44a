"""UloRL's mask of tokens that are mastered."""

from typing import Literal

from torch import Tensor

from litropy.recipes.steering.batch import UpdateBatch, row_mean
from litropy.recipes.steering.slots import TokenMask

__all__ = ["MasteredTokens"]


class MasteredTokens(TokenMask):
    """Leaves out tokens of right responses with ``pi >= tau``, while the mean entropy is below ``sigma``.

    Tokens that are left out still count in the denominator. Without the gate the entropy would grow without bound.

    Args:
        threshold: tau, in (0, 1).
        target: sigma [nats].
        gate: whose mean entropy is compared: that of the token's response, as in the paper's equation, or of the whole
            batch, as its text says.

    Raises:
        ValueError: if an option is out of its range.

    Reference: UloRL (arXiv 2507.19766), dynamic masking of well-mastered positive tokens (DMMPTs).
    """

    def __init__(
        self, threshold: float = 0.99, target: float = 0.2, gate: Literal["response", "batch"] = "response"
    ) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"`threshold` is {threshold}; it must be in (0, 1).")
        if target < 0:
            raise ValueError(f"`target` is {target}; an entropy is at least 0 nats.")
        if gate not in ("response", "batch"):
            raise ValueError(f"`gate` is {gate!r}; choose 'response' or 'batch'.")
        self.threshold, self.target, self.gate = threshold, target, gate

    def keep(self, batch: UpdateBatch) -> Tensor:
        """All but mastered tokens of right responses."""
        whole = self.gate == "batch"
        entropy = batch.token_mean(batch.entropy) if whole else row_mean(batch.entropy, batch.mask)[:, None]
        mastered = (batch.logprob.exp() >= self.threshold) & batch.rollouts.correct[:, None]
        return batch.mask & ~(mastered & (entropy < self.target))
