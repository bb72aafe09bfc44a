"""The entropy reward of ARES' published code, which is not the paper's."""

from typing import Any

import torch
from torch import Tensor

from litropy.recipes.steering.batch import RolloutBatch, stat
from litropy.recipes.steering.difficulty import bucket_means, difficulty
from litropy.recipes.steering.quantiles import row_quantile
from litropy.recipes.steering.selection import steady

__all__ = ["ReleasedReward", "released_bonus"]

# of easy, medium and hard prompts
_MARGIN = (0.15, 0.25, 0.35)
_KAPPA = (2.0, 3.0, 4.0)
_TEMPERATURE = (2.0, 2.5, 3.0)
_CAP = (1.0, 1.0, 1.2)
_WRONG = (0.6, 0.8, 1.0)
_RATE, _LARGEST, _START = 0.05, 2.0, 0.5  # of alpha
_DECAY = 0.99  # of the threshold


def released_bonus(number: Tensor, target: Tensor, alpha: Tensor, bucket: Tensor, correct: Tensor) -> Tensor:
    """What responses gain or lose by how many uncertain triggers they have.

    With ``d = N - target``, ``m = max(1, margin target)``, ``h`` Huber's loss at kappa and ``cap = alpha scale``::

        right, easy:     -cap min(1, h(max(0, d - m)) / (m + kappa))
        right, medium:   -cap min(1, h(max(0, |d| - m)) / (m + kappa))
        right, hard:     cap sigmoid((d + m) / T) from d = -m on, else -cap min(1, h(-d - m) / (2 (m + kappa)))
        wrong:           cap sigmoid(max(0, d - m) / T), times 0.6 (easy), 0.8 (medium) or 1 (hard)

    Args:
        number: N [R].
        target: of each response's bucket [R].
        alpha: of each response's bucket [R].
        bucket: 0 easy, 1 medium, 2 hard, int64 [R].
        correct: bool [R].
    """
    margin, kappa, temperature, scale, share = (
        torch.tensor(values, dtype=number.dtype, device=number.device)[bucket]
        for values in (_MARGIN, _KAPPA, _TEMPERATURE, _CAP, _WRONG)
    )
    distance, margin, cap = number - target, (margin * target.clamp(min=1)).clamp(min=1), alpha * scale

    def huber(x: Tensor) -> Tensor:
        x = x.clamp(min=0)
        return torch.where(x <= kappa, x.square() / (2 * kappa), x - kappa / 2)

    def penalty(x: Tensor) -> Tensor:
        return -cap * (huber(x) / (margin + kappa)).clamp(max=1)

    wrong = cap * share * ((distance - margin).clamp(min=0) / temperature).sigmoid()
    few = -cap * (huber(-distance - margin) / (2 * (margin + kappa))).clamp(max=1)
    hard = torch.where(distance >= -margin, cap * ((distance + margin) / temperature).sigmoid(), few)
    medium = penalty(distance.abs() - margin)
    right = torch.where(bucket == 0, penalty(distance - margin), torch.where(bucket == 1, medium, hard))
    return torch.where(correct, right, wrong)


class ReleasedReward:
    """Counts triggers that uncertain windows follow, and keeps the threshold and each bucket's alpha.

    A trigger counts if the likeliest token is one of a list, and the mean entropy of the ``width`` tokens behind it is
    at least a threshold: a running mean of the median over responses of a quantile of their windows' means, from the
    batches before, so that in the first batch every trigger counts. A bucket's target is its mean number, rounded;
    alpha moves by 0.05 of what the rounding has taken (easy, medium) or given (hard), from 0.5 within [0, 2].

    Args:
        triggers: tokens.
        width: tokens of a window.
        quantile: of a response's windows.
    """

    def __init__(self, triggers: list[int], width: int, quantile: float) -> None:
        self.triggers, self.width, self.quantile = triggers, width, quantile
        self.threshold: Tensor | None = None
        self.alpha = torch.full((3,), _START, dtype=torch.float64)

    def shape(self, batch: RolloutBatch) -> Tensor:
        """The rewards and what is added."""
        number, typical = self._count(batch)
        before = typical if self.threshold is None else self.threshold.to(typical.device)
        self.threshold = torch.lerp(typical, before, _DECAY)
        bucket = difficulty(batch)
        mean, count = bucket_means(number, bucket)
        target, sign = mean.round(), mean.new_tensor([1, 1, -1])
        alpha = self.alpha.to(mean.device)
        moved = (alpha + _RATE * sign * (mean - target)).clamp(0, _LARGEST)
        self.alpha = torch.where(count > 0, moved, alpha)
        bonus = released_bonus(number, target[bucket], self.alpha[bucket], bucket, batch.correct)
        return batch.reward + bonus.to(batch.reward.dtype)

    def _count(self, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
        """Triggers of each response that count [R], and the median of the responses' quantiles."""
        entropy, mask = stat(batch.stats, "entropy").double(), batch.mask
        following, whole = torch.zeros_like(entropy), torch.zeros_like(mask)
        span = entropy.shape[1] - self.width
        if span > 0:
            following[:, :span] = entropy.unfold(1, self.width, 1).mean(-1)[:, 1:]
            whole[:, :span] = mask[:, self.width :]
        tokens = torch.tensor(self.triggers, device=mask.device)
        found = torch.isin(stat(batch.stats, "argmax"), tokens) & whole
        if self.threshold is not None:
            found &= steady(following) >= steady(self.threshold.to(entropy.device))
        # tokens near the end have no window, and stand with the mean of the others
        some = whole.sum(-1, keepdim=True)
        filler = torch.where(some > 0, (following * whole).sum(-1, keepdim=True) / some.clamp(min=1), entropy[:, :1])
        quantiles = row_quantile(torch.where(whole, following, filler), mask, self.quantile)
        return found.sum(-1).double(), quantiles.quantile(0.5)

    def state_dict(self) -> dict[str, Any]:
        """Threshold and alpha."""
        threshold = {} if self.threshold is None else {"threshold": float(self.threshold)}
        return threshold | {"alpha": self.alpha.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        threshold = state_dict.get("threshold")
        self.threshold = None if threshold is None else torch.tensor(threshold, dtype=torch.float64)
        self.alpha = torch.tensor(state_dict["alpha"], dtype=torch.float64)
