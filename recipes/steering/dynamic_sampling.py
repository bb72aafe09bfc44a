"""Dynamic sampling: only prompts that are neither always nor never solved."""

from typing import Any

from litropy.recipes.steering.batch import RolloutBatch
from litropy.recipes.steering.concatenation import concatenate
from litropy.recipes.steering.slots import DataSelection

__all__ = ["DynamicSampling"]


class DynamicSampling(DataSelection):
    """Keeps groups whose share of right responses is between two bounds, and samples on until there are enough.

    Args:
        groups: prompts to train on in each round, over all ranks; what is left over is dropped.
        low: groups with this share of right responses or less are dropped.
        high: groups with this share or more are dropped.
        max_batches: after this many batches of prompts, train on what there is.

    Raises:
        ValueError: if an option is out of its range.

    Reference: DAPO (arXiv 2503.14476), equation 11.
    """

    keeps_rest = False  # for the next round

    def __init__(self, groups: int, low: float = 0.0, high: float = 1.0, max_batches: int = 10) -> None:
        if groups < 1 or max_batches < 1:
            raise ValueError(f"`groups` ({groups}) and `max_batches` ({max_batches}) must be at least 1.")
        if not 0 <= low < high <= 1:
            raise ValueError(f"`low` ({low}) and `high` ({high}) must be from 0 to 1, in this order.")
        self.groups, self.low, self.high, self.max_batches = groups, low, high, max_batches
        self._kept: RolloutBatch | None = None
        self._batches = 0

    def select(self, batch: RolloutBatch) -> RolloutBatch | None:
        """The kept groups once there are enough, None before."""
        share = batch.group_mean(batch.correct.to(batch.reward.dtype))
        kept = batch[((share > self.low) & (share < self.high)).nonzero()[:, 0]]
        self._kept = kept if self._kept is None else concatenate([self._kept.to(kept.row.device), kept])
        self._batches += 1
        index, count = self._kept.group_index()
        if len(count) < self.groups and self._batches < self.max_batches:
            return None
        chosen = self._kept[(index < self.groups).nonzero()[:, 0]]
        rest = self._kept[(index >= self.groups).nonzero()[:, 0]]
        self._kept, self._batches = rest if self.keeps_rest and len(rest) else None, 0
        return chosen

    def state_dict(self) -> dict[str, Any]:
        """The groups that wait."""
        return {"batches": self._batches, "kept": None if self._kept is None else self._kept.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        self._batches = state_dict["batches"]
        kept = state_dict["kept"]
        self._kept = None if kept is None else RolloutBatch.from_dict(kept)
