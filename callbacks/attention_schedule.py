"""When attention is probed, on which rows, and what that costs."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ProbeCost", "ProbeSchedule", "sample_rows"]


@dataclass
class ProbeSchedule:
    """Every optimiser step at first, then every n-th.

    Attributes:
        dense_steps: how many steps are all probed.
        every_n_steps: distance of the probes after those.
        position: steps that have begun, since the first fit.

    Example::

        >>> schedule = ProbeSchedule(dense_steps=2, every_n_steps=3)
        >>> [schedule.begin_step() for _ in range(8)]
        [True, True, False, True, False, False, True, False]
    """

    dense_steps: int
    every_n_steps: int
    position: int = 0

    def begin_step(self) -> bool:
        """Count a step that begins, and say whether it is probed."""
        step, self.position = self.position, self.position + 1
        return step < self.dense_steps or step % self.every_n_steps == 0

    @property
    def is_dense(self) -> bool:
        """Whether the step that has begun belongs to the dense steps."""
        return self.position <= self.dense_steps


@dataclass
class ProbeCost:
    """Time of probes against time of steps.

    Attributes:
        probe_ms: of all probes [ms].
        step_ms: of all steps, probes included [ms].
        last_ms: of the latest probe [ms].
    """

    probe_ms: float = 0.0
    step_ms: float = 0.0
    last_ms: float = 0.0

    def add_probe(self, ms: float) -> None:
        """Add a probe."""
        self.probe_ms += ms
        self.last_ms = ms

    @property
    def share(self) -> float:
        """Part of the time that probes took, from 0 to 1."""
        return min(1.0, self.probe_ms / self.step_ms) if self.step_ms else 0.0


def sample_rows(length: int, wanted: int, seed: int) -> Tensor:
    """Draw rows at random, one from each of ``wanted`` equal stretches of a sequence, in order; all if it is short.

    Every row is as likely as any other, so means over sampled rows are unbiased, and vary less than those over rows
    that are drawn independently.

    Args:
        length: rows there are.
        wanted: rows to draw.
        seed: of the draw; the global random state is neither read nor changed.

    Example::

        >>> sample_rows(1000, 4, seed=0).tolist()
        [242, 426, 614, 980]
    """
    if length <= wanted:
        return torch.arange(length)
    uniform = torch.rand(wanted, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((torch.arange(wanted) + uniform) * (length / wanted)).long().clamp_max(length - 1)
