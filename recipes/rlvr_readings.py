"""What RLVR tells the callbacks that watch a policy: its latest batch of responses, and the updates on it."""

import torch
from torch import Tensor

from litropy.callbacks.policy_readings import PolicyReadings, PolicySample, PolicyUpdate
from litropy.recipes.rlvr_rollouts import Judged
from litropy.recipes.rlvr_samples import Sample
from litropy.recipes.steering.batch import RolloutBatch, UpdateBatch, stat
from litropy.recipes.steering.objective import Objective

__all__ = ["PolicyRecord", "policy_update"]


def policy_update(found: Objective, batch: UpdateBatch) -> PolicyUpdate:
    """One optimiser step as callbacks read it; the slope is that of the policy that wrote the tokens."""
    stats, slope = batch.rollouts.stats, None
    if stats.entropy_drift is not None:
        slope = stats.entropy_drift - batch.old.exp() * (batch.old + stat(stats, "entropy"))
    return PolicyUpdate(
        mask=batch.mask,
        logprob=batch.logprob,
        entropy=batch.entropy,
        log_ratio=batch.log_ratio,
        advantage=found.advantage,
        weight=found.weight * found.kept,
        slope=slope,
        clipped=found.clipped,
    )


class PolicyRecord:
    """The latest batch of responses, and the terms of its updates' losses."""

    def __init__(self) -> None:
        self.readings: PolicyReadings | None = None
        self._updates: list[PolicyUpdate] = []
        self._terms: list[dict[str, Tensor]] = []

    def begin(self, step: int, samples: list[Sample], judged: Judged, rollouts: RolloutBatch) -> None:
        """Start with a batch of responses: this rank's in words, and the numbers of all ranks."""
        size = judged.request.group_size
        words = [
            PolicySample(samples[row // size].prompt, text, result.value, result.correct, result.answer, row // size)
            for row, (text, result) in enumerate(zip(judged.texts, judged.results, strict=True))
        ]
        self._updates, self._terms = [], []
        self.readings = PolicyReadings(
            step=step,
            responses=rollouts.responses,
            mask=rollouts.mask,
            entropy=stat(rollouts.stats, "entropy"),
            correct=rollouts.correct,
            samples=words,
            updates=self._updates,
        )

    def add(self, found: Objective, batch: UpdateBatch) -> None:
        """Add an optimiser step on the responses."""
        self._updates.append(policy_update(found, batch))
        self._terms.append({"loss": found.loss} | found.terms)

    def means(self) -> dict[str, Tensor]:
        """Means of the losses' terms over the steps."""
        return {
            name: torch.stack([terms[name] for terms in self._terms]).mean() for name in next(iter(self._terms), ())
        }
