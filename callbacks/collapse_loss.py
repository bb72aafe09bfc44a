"""Whether the loss still improves: the rate after an alarm against the rate before what led to it."""

import math
from collections import deque
from typing import Any, Literal, NamedTuple

import numpy as np

from litropy.callbacks.collapse_baseline import median_and_scale
from litropy.callbacks.collapse_state import PlainState

__all__ = ["LossHistory", "LossTrend", "Rate", "SpikeRule", "improvement"]


class Rate(NamedTuple):
    """How much the loss falls a step, and the standard error of that, both in units of the loss a step."""

    value: float
    error: float


class LossTrend(NamedTuple):
    """A loss before and after something.

    Attributes:
        verdict: ``stalled``: it improves at less than a share of the earlier rate; ``learning``: it improves faster
            than before, or hardly anything is left of it; ``unknown``: neither, or too few steps to tell.
        before: improvement a step before it.
        after: improvement a step after it.
    """

    verdict: Literal["learning", "stalled", "unknown"]
    before: float = math.nan
    after: float = math.nan


def improvement(steps: Any, losses: Any) -> Rate:
    r"""Negative least-squares slope of a loss curve and its standard error.

    .. math:: r = -S_{tx} / S_{tt}, \qquad \mathrm{error} = \sqrt{\mathrm{RSS} / ((n - 2) S_{tt})}

    Args:
        steps: optimiser steps, [n], n > 2.
        losses: the loss of each.

    Example::

        >>> rate = improvement(range(10), [4 - 0.1 * t for t in range(10)])
        >>> round(rate.value, 6), round(rate.error, 6)
        (0.1, 0.0)
    """
    t, x = np.asarray(steps, dtype=float), np.asarray(losses, dtype=float)
    t, x = t - t.mean(), x - x.mean()
    spread = float((t * t).sum())
    slope = float((t * x).sum()) / spread
    residual = x - slope * t
    return Rate(-slope, math.sqrt(float((residual * residual).sum()) / (len(t) - 2) / spread))


class LossHistory(PlainState):
    """The losses of the last thousand steps and of the first few, and what they say about learning.

    Args:
        share: share of the earlier rate of improvement below which the loss counts as stalled.
    """

    saved = ("recent", "first")
    window, longest, capacity, significance = 20, 100, 1024, 3.0

    def __init__(self, share: float) -> None:
        self.share = share
        self.recent: deque[Any] = deque(maxlen=self.capacity)
        self.first: list[float] = []

    def add(self, step: int, loss: float) -> None:
        """Take the loss of a step; a loss that is not finite says nothing about a trend."""
        if math.isfinite(loss):
            self.recent.append((float(step), loss))
            if len(self.first) < self.window:
                self.first = [*self.first, loss]

    @property
    def at_start(self) -> float:
        """Median loss of the first steps; NaN before the first."""
        return float(np.median(self.first)) if len(self.first) else math.nan

    @property
    def now(self) -> float:
        """Median loss of the last five steps; NaN before the first."""
        return float(np.median([loss for _, loss in list(self.recent)[-5:]])) if self.recent else math.nan

    @property
    def learned(self) -> bool:
        """Whether hardly anything is left of the loss of the first steps."""
        return abs(self.now) < 0.05 * abs(self.at_start)

    def trend(self, onset: float) -> LossTrend:
        """Compare the loss after the onset of something with as many steps before it.

        At least 20 steps, and at most 100 or a quarter of the steps until the onset, whichever is more: further apart,
        a loss that falls as it should improves more slowly, too. A verdict needs a difference of three standard errors.
        Before a run's twentieth step there is no earlier rate: what began there is compared with the first twenty
        steps.
        """
        if not self.recent or math.isnan(onset):
            return LossTrend("unknown")
        if self.learned:
            return LossTrend("learning")
        steps, losses = np.asarray(self.recent, dtype=float).T
        border = max(onset, steps[0] + self.window)
        after = (steps >= border) & (steps < border + max(self.longest, onset / 4))
        before = (steps < border) & (steps >= border - max(int(after.sum()), self.window))
        if after.sum() < self.window or before.sum() < self.window // 2:
            return LossTrend("unknown")
        past, present = improvement(steps[before], losses[before]), improvement(steps[after], losses[after])
        # a loss that did not fall before, as on a plateau, gives no rate to fall short of
        rate = max(past.value, 0.0)
        error = past.error if rate else 0.0
        if present.value < self.share * rate - self.significance * math.hypot(present.error, self.share * error):
            return LossTrend("stalled", past.value, present.value)
        faster = present.value > rate + self.significance * math.hypot(present.error, error)
        return LossTrend("learning" if faster else "unknown", past.value, present.value)


class SpikeRule(PlainState):
    r"""Finds spikes: the median of five losses far above that of the twenty before.

    .. math:: m_5 - m_{20} > \max(6 \cdot 1.4826\,\mathrm{MAD}_{20},\; 0.05\,|m_{20}|,\; 0.01\,|\mathrm{first}|)

    The last term keeps a loss that is nearly zero from spiking; ``first`` is the first median of twenty.

    Example::

        >>> rule = SpikeRule()
        >>> [step for step in range(40) if rule.update(2.0 + 0.01 * (step % 3) + (step > 33))]
        [36, 37, 38, 39]
    """

    saved = ("recent", "first")
    short, window = 5, 20

    def __init__(self) -> None:
        self.recent: deque[Any] = deque(maxlen=self.short + self.window)
        self.first: float | None = None

    def update(self, loss: float) -> tuple[float, float] | None:
        """Take a loss; return (level before, level now) if it spikes."""
        if math.isfinite(loss):
            self.recent.append(loss)
        if len(self.recent) < self.short + self.window:
            return None
        losses = list(self.recent)
        before, scale = median_and_scale(losses[: self.window])
        now = float(np.median(losses[self.window :]))
        self.first = float(before) if self.first is None else self.first
        limit = max(6 * float(scale), 0.05 * abs(float(before)), 0.01 * abs(self.first))
        return (float(before), now) if now - float(before) > limit else None
