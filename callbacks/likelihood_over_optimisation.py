"""Notices when training on likelihoods, of preferences say, has gone too far: by the top-k entropy and mass."""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["LikelihoodOverOptimisation", "Smoothed", "smooth"]


class Smoothed(NamedTuple):
    """Mean of the latest values, and t, their slope in units of its standard error."""

    mean: float
    t: float


def smooth(values: Sequence[float]) -> Smoothed:
    r"""Fit a line to the latest values of a curve.

    .. math:: b = S_{ix} / S_{ii}, \qquad t = b \Big/ \sqrt{(S_{xx} - b S_{ix}) / ((n - 2) S_{ii})}

    Args:
        values: the latest values x, at equal distances, more than 2.

    Example::

        >>> smoothed = smooth([1.0, 1.5, 2.5, 3.0])
        >>> print(smoothed.mean, round(smoothed.t, 2))
        2.0 9.9
    """
    n = len(values)
    mean, middle = sum(values) / n, (n - 1) / 2
    ii = n * (n**2 - 1) / 12
    ix = sum((i - middle) * x for i, x in enumerate(values))
    xx = sum((x - mean) ** 2 for x in values)
    rest = max(xx - ix**2 / ii, 1e-12 * xx)
    return Smoothed(mean, ix / math.sqrt(rest * ii / (n - 2)) if rest else 0.0)


class LikelihoodOverOptimisation:
    r"""Finds the turning point of a run: where the smoothed top-k entropy stops rising and falls.

    The curve is :math:`-\sum_{i \le k} p_i \ln p_i`, not renormalised, as in the paper, where its turning point in
    preference training (DPO, IPO) falls on the highest win rate. A second sign, for losses under which entropy never
    turns (hinge), is a top-k mass that is ``mass_drop`` under its highest while the entropy is above what it was there:
    probability goes to unlikely tokens.

    Each is smoothed over the last ``window`` probes. A rise counts from 5 %, a fall from 10 % of the highest value so
    far, and while the slope over the window is four standard errors from 0. A run that falls from its start on has no
    turning point. One that has one need not be spoilt: pretraining, or adapting to a new text, passes it as well.

    Args:
        window: probes to smooth over.
        mass_drop: fall of the mass.

    Attributes:
        level: 1 after a turning point, until entropy rises again, or while probability goes to unlikely tokens; else 0.

    Example::

        >>> rule = LikelihoodOverOptimisation(window=5)
        >>> curve = [2.0 - (step - 50) ** 2 / 5000 for step in range(100)]
        >>> print([message for step, x in enumerate(curve) if (message := rule.update(step, x, 0.9))][0])
        the entropy of the likeliest tokens rose to 2.00 nats until about step 50 and has fallen since: ...

    Reference: Shi et al., Understanding Likelihood Over-optimisation in Direct Alignment Algorithms, arXiv 2410.11677,
    section 5.
    """

    rise, fall, significance = 0.05, 0.1, 4.0
    saved = ("rising", "turned", "spreads", "low", "high", "high_step", "highest", "mass", "entropy_at_mass")

    def __init__(self, window: int = 20, mass_drop: float = 0.05) -> None:
        self.mass_drop = mass_drop
        self.recent: deque[tuple[float, ...]] = deque(maxlen=window)
        self.rising = self.turned = self.spreads = False
        self.low, self.high, self.high_step, self.highest = math.inf, -math.inf, 0.0, 0.0
        self.mass, self.entropy_at_mass = 0.0, 0.0

    @property
    def level(self) -> int:
        """0 or 1."""
        return int(self.turned or self.spreads)

    def update(self, step: int, entropy: float, mass: float) -> str | None:
        """Take one probe; return a message when something new shows.

        Args:
            step: optimiser step.
            entropy: raw entropy of the k likeliest tokens [nats].
            mass: their probability.
        """
        if not (math.isfinite(entropy) and math.isfinite(mass)):
            return None
        self.recent.append((step, entropy, mass))
        if len(self.recent) < (self.recent.maxlen or 0):
            return None
        steps, entropies, masses = zip(*self.recent, strict=True)
        middle, smoothed = sum(steps) / len(steps), smooth(entropies)
        self.highest = max(self.highest, smoothed.mean)
        return self._turn(middle, smoothed) or self._spread(smoothed.mean, smooth(masses).mean)

    def _turn(self, step: float, now: Smoothed) -> str | None:
        if not self.rising:
            self.low = min(self.low, now.mean)
            if now.mean > self.low + self.rise * self.highest and now.t > self.significance:
                self.rising, self.turned, self.high = True, False, -math.inf
        if self.rising:
            if now.mean > self.high:
                self.high, self.high_step = now.mean, step
            if now.mean < self.high - self.fall * self.highest and now.t < -self.significance:
                self.rising, self.turned, self.low = False, True, now.mean
                return (
                    f"the entropy of the likeliest tokens rose to {self.high:.2f} nats until about step"
                    f" {self.high_step:.0f} and has fallen since: in preference training the best model is about there"
                    " (likelihood over-optimisation); in other training, see whether the held-out loss rises"
                )
        return None

    def _spread(self, entropy: float, mass: float) -> str | None:
        if mass > self.mass:
            self.mass, self.entropy_at_mass = mass, entropy
        before = self.spreads
        higher = entropy > self.entropy_at_mass + self.rise * self.highest
        self.spreads = higher and mass < self.mass - self.mass_drop
        if before or not self.spreads:
            return None
        return (
            f"the probability of the likeliest tokens has fallen from {self.mass:.3f} to {mass:.3f} while their entropy"
            f" rose from {self.entropy_at_mass:.2f} to {entropy:.2f} nats: probability goes to unlikely tokens"
            " (likelihood over-optimisation)"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain lists and numbers."""
        return {name: getattr(self, name) for name in self.saved} | {"recent": [list(probe) for probe in self.recent]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        for name in self.saved:
            setattr(self, name, state_dict[name])
        self.recent = deque(map(tuple, state_dict["recent"]), self.recent.maxlen)
