"""ARES' entropy reward: how much a wrong response has explored, against what its prompt's difficulty asks for."""

from typing import Any

import torch
from torch import Tensor

from litropy.recipes.steering.ares_released import ReleasedReward
from litropy.recipes.steering.batch import RolloutBatch
from litropy.recipes.steering.difficulty import BUCKETS, bucket_means, difficulty, uncertain_windows
from litropy.recipes.steering.slots import RewardShaping

__all__ = ["ARESReward"]


class ARESReward(RewardShaping):
    """Takes from wrong responses: ``R - lambda_d g(N - target_d)``, with N the uncertain windows of the response.

    g is ``max(0, x)`` for easy prompts, ``|x|`` for medium and ``max(0, -x)`` for hard ones: too much exploration costs
    on easy prompts, too little on hard ones. ``lambda_d = max(0, (mean N - target_d) / (var N + eps))`` over the
    responses of a bucket. The paper takes the mean N of the same batch for the target, which makes lambda 0; here the
    target is the running mean of earlier batches, so the first batch that has a bucket takes nothing there.

    Args:
        width: tokens of a window.
        quantile: of a response's entropies, above which a window's mean is high, in (0, 1).
        decay: of the running mean, in [0, 1); 0 takes the batch before.
        eps: added to the variance, and keeps lambda small where all N of a bucket are equal.
        released: take the reward of the authors' code, which is another one (``ReleasedReward``): N counts listed
            tokens that an uncertain window follows, right responses lose or gain too, and wrong ones only gain. Its
            entropies are over the ten likeliest tokens and one for the rest, these over all.
        triggers: the tokens that it counts, such as those of "wait" and "but".

    Raises:
        ValueError: if an option is out of its range, or one of ``released`` and ``triggers`` is without the other.

    Reference: ARES (arXiv 2510.08457), hierarchical entropy reward.
    """

    def __init__(
        self,
        width: int = 4,
        quantile: float = 0.95,
        decay: float = 0.9,
        eps: float = 1.0,
        released: bool = False,
        triggers: list[int] | None = None,
    ) -> None:
        if width < 1 or not 0 < quantile < 1:
            raise ValueError(f"`width` ({width}) must be at least 1, and `quantile` ({quantile}) in (0, 1).")
        if not 0 <= decay < 1 or not eps > 0:
            raise ValueError(f"`decay` ({decay}) must be in [0, 1), and `eps` ({eps}) above 0.")
        if released != bool(triggers):
            raise ValueError(
                f"`released` is {released} and `triggers` is {triggers}: the authors' reward counts listed tokens, and"
                " the paper's knows none. Give both or neither."
            )
        self.width, self.quantile, self.decay, self.eps = width, quantile, decay, eps
        self._released = ReleasedReward(triggers, width, quantile) if triggers else None
        self.statistics = ("argmax",) if released else ()
        self._targets: Tensor | None = None  # NaN for a bucket that has not been seen

    def shape(self, batch: RolloutBatch) -> Tensor:
        """The rewards less what wrong responses lose; then move the targets."""
        if self._released is not None:
            return self._released.shape(batch)
        bucket = difficulty(batch)
        number = uncertain_windows(batch, self.width, self.quantile).sum(-1).double()
        mean, count = bucket_means(number, bucket)
        variance, _ = bucket_means((number - mean[bucket]).square(), bucket)
        known = torch.full_like(mean, torch.nan) if self._targets is None else self._targets.to(mean.device)
        target = torch.where(known.isnan(), mean, known)
        excess = (number - target[bucket]) * torch.tensor([1, 0, -1], device=mean.device)[bucket]
        cost = torch.where(bucket == 1, (number - target[bucket]).abs(), excess.clamp(min=0))
        price = ((mean - target) / (variance + self.eps)).clamp(min=0)
        moved = self.decay * target + (1 - self.decay) * mean
        self._targets = torch.where(count > 0, moved, known)
        return batch.reward - torch.where(batch.correct, 0, price[bucket] * cost).to(batch.reward.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The targets of the buckets seen so far."""
        if self._released is not None:
            return self._released.state_dict()
        targets = [] if self._targets is None else self._targets.tolist()
        return {name: value for name, value in zip(BUCKETS, targets, strict=False) if value == value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        if self._released is not None:
            self._released.load_state_dict(state_dict)
            return
        values = [state_dict.get(name, torch.nan) for name in BUCKETS]
        self._targets = torch.tensor(values, dtype=torch.float64)
