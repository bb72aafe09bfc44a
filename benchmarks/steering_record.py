"""What the runs of the steering benchmark are measured by: the exact chance of every right answer, without sampling."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

# two digits that sum to a target; prompts have 1 to 10 right answers
TERMS, LARGEST = 2, 9
# answers that somebody would look at
K = 16

Found = dict[str, float]


def solutions() -> tuple[Tensor, Tensor]:
    """Every right answer of every prompt: its digits [S, 2], and the prompt's target [S]."""
    digits = torch.tensor(list(itertools.product(range(LARGEST + 1), repeat=TERMS)))
    return digits, digits.sum(-1)


def passes(logprob: Tensor, target: Tensor) -> Found:
    """Accuracy and diversity of a policy: what the estimators of validation expect.

    ``pass@1 = sum_a p_a`` and ``distinct-correct@K = sum_a 1 - (1 - p_a)^K`` over the right answers a of a prompt,
    means over prompts.

    Args:
        logprob: of every right answer [S, nats].
        target: the prompt that it belongs to [S].

    Example::

        >>> passes(torch.tensor([0.5, 0.5, 0.25]).log(), torch.tensor([0, 0, 1]))["pass_at_1"]
        0.625
    """
    chance = logprob.double().exp().clamp(max=1)
    prompts, place = torch.unique(target, return_inverse=True)
    values = {"pass_at_1": chance, "distinct_correct": 1 - (1 - chance) ** K}
    sums = {name: chance.new_zeros(len(prompts)).index_add(0, place, value) for name, value in values.items()}
    return {name: float(value.mean()) for name, value in sums.items()}


class Curves:
    """Points of a run over batches of responses.

    A point has the mean entropy of the batches since the last one, and accuracy and diversity behind them; the first
    has those of the policy that nothing has been done to.

    Args:
        measure: the policy as it is now.
        every: batches from point to point.
    """

    def __init__(self, measure: Callable[[], Found], every: int) -> None:
        self.measure, self.every = measure, every
        self.points: dict[str, list[float]] = {
            name: [] for name in ("batch", "entropy", "pass_at_1", "distinct_correct")
        }
        self._at_start = measure()
        self._entropies: list[float] = []
        self._batches = 0

    def add(self, entropy: float) -> None:
        """Take the entropy of a batch of responses [nats a token], once it has been trained on."""
        if not self._batches:
            self._note(entropy, self._at_start)
        self._batches += 1
        self._entropies.append(entropy)
        if len(self._entropies) == self.every:
            self._note(sum(self._entropies) / self.every, self.measure())
            self._entropies = []

    def _note(self, entropy: float, found: Found) -> None:
        for name, value in {"batch": self._batches, "entropy": entropy, **found}.items():
            self.points[name].append(value if name == "batch" else round(value, 4))
