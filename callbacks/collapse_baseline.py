"""Deciding on noisy numbers: conditions that must last, and drifts away from a robust baseline."""

from typing import Any

import numpy as np

from litropy.callbacks.collapse_state import PlainState

__all__ = ["Drift", "Hold", "median_and_scale"]


def median_and_scale(values: Any) -> tuple[Any, Any]:
    r"""Median and robust standard deviation, :math:`1.4826\,\mathrm{median}|x - \mathrm{median}\,x|`, over axis 0.

    Args:
        values: numbers, [n] or [n, L].

    Example::

        >>> median, scale = median_and_scale([1.0, 2.0, 3.0, 4.0, 1000.0])
        >>> print(median, scale)
        3.0 1.4826
    """
    values = np.asarray(values, dtype=float)
    median = np.median(values, axis=0)
    return median, 1.4826 * np.median(np.abs(values - median), axis=0)


class Hold(PlainState):
    """Whether conditions have lasted: true after enough probes in a row, and until as many in a row say no.

    Args:
        probes: how many probes in a row, for a start as for an end.
        steps: how many steps must lie between the first of them and the one that decides a start.

    Example::

        >>> hold = Hold(probes=2, steps=1)
        >>> [bool(hold.update(step, [yes])[0]) for step, yes in enumerate([1, 0, 1, 1, 0, 1, 0, 0])]
        [False, False, False, True, True, True, True, False]
    """

    saved = ("active", "since", "yes", "no")

    def __init__(self, probes: int = 3, steps: int = 4) -> None:
        self.probes = probes
        self.steps = steps
        self.active = np.zeros(0, dtype=bool)
        self.since = np.zeros(0)
        self.yes = np.zeros(0, dtype=int)
        self.no = np.zeros(0, dtype=int)

    def update(self, step: int, condition: Any) -> np.ndarray:
        """Take the conditions of one probe, [L] booleans; return which have lasted."""
        now = np.asarray(condition, dtype=bool)
        if self.active.shape != now.shape:
            self.active = np.zeros(now.shape, dtype=bool)
            self.since = np.full(now.shape, np.nan)
            self.yes, self.no = np.zeros(now.shape, dtype=int), np.zeros(now.shape, dtype=int)
        self.since = np.where(now & (self.yes == 0) & ~self.active, step, self.since)
        self.yes = np.where(now, self.yes + 1, 0)
        self.no = np.where(now, 0, self.no + 1)
        started = (self.yes >= self.probes) & (step - self.since >= self.steps)
        self.active = (self.active & (self.no < self.probes)) | started
        return self.active

    def end(self, index: int) -> None:
        """Forget one condition's past."""
        self.active[index] = False
        self.yes[index] = self.no[index] = 0


class Drift(PlainState):
    r"""CUSUM of 20-step means against a robust baseline, which autocorrelated noise hardly ever sets off.

    .. math:: C_t = \max(0, C_{t-1} + d\,z_t - k), \qquad z_t = (x_t - \mathrm{median}) / \mathrm{scale}

    for each direction d of -1 and +1, k = 1; a value has drifted once C exceeds 10. The baseline is the first twenty
    means after the ``skip``; a drift starts a new one. Probes that are further apart than 20 steps are a mean each.

    Attributes:
        blocks: how many means there have been.

    Args:
        floor: smallest scale, in the values' unit: a shift by less than one of these is never found.
        block: steps that are averaged.
        skip: how many means to leave out at the start, when everything moves.

    Example::

        >>> drift = Drift(floor=0.01, block=1, skip=0)
        >>> [step for step in range(60) if drift.update(step, [0.9 if step < 40 else 0.85])[0]]
        [43]
    """

    saved = ("start", "blocks", "count", "total", "filled", "baseline", "sums")
    allowance, limit, size = 1.0, 10.0, 20

    def __init__(self, floor: float, block: int = 20, skip: int = 5) -> None:
        self.floor = floor
        self.block = block
        self.skip = skip
        self.start: int | None = None
        self.blocks = 0
        self.count = 0
        self.total: Any = 0.0
        self.filled: Any = None
        self.baseline: Any = None
        self.sums: Any = None

    def update(self, step: int, values: Any) -> list[int]:
        """Take the values [L] of one probe; return -1 or +1 for each that is found to have drifted now, else 0."""
        values = np.asarray(values, dtype=float)
        if self.start is None:
            self.start = step
            # negative while means are left out
            self.filled = np.full(len(values), -self.skip)
            self.baseline = np.zeros((self.size, len(values)))
            self.sums = np.zeros((2, len(values)))
        moved = [0] * len(values)
        if step - self.start >= self.block:
            moved = self._add(self.total / self.count)
            self.blocks += 1
            self.start += (step - self.start) // self.block * self.block
            self.total, self.count = 0.0, 0
        self.total = self.total + values
        self.count += 1
        return moved

    def _add(self, mean: np.ndarray) -> list[int]:
        known = np.isfinite(mean)
        mean = np.where(known, mean, 0.0)
        judged = (self.filled >= self.size) & known
        median, scale = median_and_scale(self.baseline)
        z = (mean - median) / np.maximum(scale, self.floor)
        sums = np.maximum(0, self.sums + np.stack([-z, z]) - self.allowance)
        self.sums = np.where(judged, sums, self.sums)
        for index in np.flatnonzero(known & ~judged & (self.filled >= 0)):
            self.baseline[self.filled[index], index] = mean[index]
        self.filled = np.where(known & ~judged, self.filled + 1, self.filled)
        down, up = self.sums > self.limit
        # a new baseline for what has drifted
        self.filled = np.where(down | up, 0, self.filled)
        self.sums = np.where(down | up, 0.0, self.sums)
        return np.where(down, -1, np.where(up, 1, 0)).tolist()
