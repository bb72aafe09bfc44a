"""What validation of a policy reports: pass@1, pass@k, maj@k, distinct right answers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from litropy.recipes.rlvr_judging import distinct_correct_at_k, majority_at_k, pass_at_k
from litropy.recipes.rlvr_samples import RewardResult
from litropy.recipes.token_mean import TokenMean

__all__ = ["PassEvaluation"]


class PassEvaluation(nn.Module):
    """Means over the prompts of a data set, across batches and ranks.

    Args:
        samples: responses to each prompt.
        k: of pass@k, maj@k and distinct-correct@k, at most ``samples``.

    Raises:
        ValueError: if k is not in 1 to ``samples``.
    """

    def __init__(self, samples: int, k: int) -> None:
        super().__init__()
        if not 1 <= k <= samples:
            raise ValueError(f"`val_k` is {k}; it must be in 1 to `val_samples` ({samples}).")
        self.samples, self.k, self.batches = samples, k, 0
        names = ("reward", "pass_at_1", "pass_at_k", "maj_at_k", "distinct_correct_at_k")
        self.means = nn.ModuleDict({name: TokenMean() for name in names})

    def update(self, results: Sequence[RewardResult]) -> None:
        """Add the results of some prompts, ``samples`` in a row for each."""
        self.batches += 1
        groups = [results[start : start + self.samples] for start in range(0, len(results), self.samples)]
        correct = [sum(result.correct for result in group) for group in groups]
        values = {
            "reward": [sum(result.value for result in group) / self.samples for group in groups],
            "pass_at_1": [pass_at_k(c, self.samples, 1) for c in correct],
            "pass_at_k": [pass_at_k(c, self.samples, self.k) for c in correct],
            "maj_at_k": [majority_at_k(group, self.k) for group in groups],
            "distinct_correct_at_k": [distinct_correct_at_k(group, self.k) for group in groups],
        }
        for name, mean in self.means.items():
            assert isinstance(mean, TokenMean)
            mean.update(*(torch.tensor(x, device=mean.device) for x in (float(sum(values[name])), len(groups))))

    def pop(self) -> dict[str, Tensor]:
        """Return the means so far, the same on every rank, and start again."""
        values, self.batches = {}, 0
        for name, mean in self.means.items():
            assert isinstance(mean, TokenMean)
            values[name] = mean.compute()
            mean.reset()
        return values
