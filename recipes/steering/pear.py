"""PEAR: a reward that is lower for uncertain thinking, which shortens it."""

import torch
from torch import Tensor

from litropy.callbacks.policy_statistics import thinking_end
from litropy.recipes.steering.batch import RolloutBatch, row_mean, stat
from litropy.recipes.steering.slots import RewardShaping

__all__ = ["PEAR"]


class PEAR(RewardShaping):
    """Takes off what thinking is more uncertain than the answer: ``min(1, score - max(0, H_think - alpha H_answer))``.

    The H are mean entropies of the tokens before and behind the mark that ends thinking, under the policy that wrote
    them; without the mark all is thinking, and ``H_answer = 0``. A wrong response gets ``wrong``. This lowers the
    entropy of thinking: it makes responses short, not diverse.

    Args:
        marker: tokens that end thinking; ``</think>`` is [151668] in Qwen3, several tokens elsewhere.
        score: s, of a right response, in (0, 1].
        wrong: of any other, in [0, 1).
        alpha: how much uncertainty of the answer excuses that of thinking.

    Raises:
        ValueError: if an option is out of its range.

    Reference: PEAR (arXiv 2510.08026), phase entropy aware reward.
    """

    def __init__(self, marker: list[int], score: float = 1.0, wrong: float = 0.0, alpha: float = 1.0) -> None:
        if not marker:
            raise ValueError("`marker` is empty; give the tokens that end thinking, such as [151668] for Qwen3.")
        if not 0 < score <= 1 or not 0 <= wrong < 1:
            raise ValueError(f"`score` ({score}) must be in (0, 1], and `wrong` ({wrong}) in [0, 1).")
        self.marker, self.score, self.wrong, self.alpha = marker, score, wrong, alpha

    def shape(self, batch: RolloutBatch) -> Tensor:
        """The reward of each response."""
        end = thinking_end(batch.responses, batch.mask, self.marker)[:, None]
        place = torch.arange(batch.mask.shape[1], device=end.device)
        entropy = stat(batch.stats, "entropy")
        think = row_mean(entropy, batch.mask & (place < end))
        answer = row_mean(entropy, batch.mask & (place >= end + len(self.marker)))
        penalty = (think - self.alpha * answer).clamp(min=0)
        right = (self.score - penalty).clamp(max=1)
        return torch.where(batch.correct, right, self.wrong).to(batch.reward.dtype)
