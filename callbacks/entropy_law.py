r"""The law that a policy buys accuracy with entropy, fitted by least squares."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

__all__ = ["EntropyLaw", "Forecast", "fit_entropy_law", "student_quantile"]

LEAST_POINTS = 5


def student_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t distribution, by its expansion around the normal one; within 1 % from 3 degrees on.

    Args:
        probability: share of the distribution below, in (0, 1).
        freedom: degrees of freedom, at least 3.

    Example::

        >>> round(student_quantile(0.975, 10), 3)
        2.228

    Reference: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


@dataclass(frozen=True)
class Forecast:
    """An accuracy that the law expects, and the interval that it lies in.

    Attributes:
        value: expected accuracy; above 1 or below 0 it says that the law does not hold.
        low: lower end of the interval.
        high: upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class EntropyLaw:
    r"""The line :math:`R = -a e^H + b` through points of entropy H and accuracy R.

    Attributes:
        a: accuracy that a unit of e^H costs.
        b: accuracy at which entropy would be minus infinity; ``b - a`` is the ceiling, at entropy 0.
        error: root mean square of the residuals.
        explained: share of the variance of R that the law explains, from 0 to 1.
        points: how many points.
        mean: of e^H.
        spread: sum of squared distances of e^H from its mean.
        independent: how many of the points count, as residuals of a run resemble those of the step before.
    """

    a: float
    b: float
    error: float
    explained: float
    points: int
    mean: float
    spread: float
    independent: float

    def forecast(self, entropy: float = 0.0, confidence: float = 0.95) -> Forecast:
        r"""Accuracy of the law at an entropy, with the interval of the line there; entropy 0 gives the ceiling.

        .. math:: -a x + b \pm t\, s \sqrt{\frac{n}{n_\text{eff}} \Big(\frac1n + \frac{(x - \bar x)^2}{S_{xx}}\Big)},
            \qquad x = e^H

        Args:
            entropy: H [nats].
            confidence: share of cases in which the interval holds the line, in (0, 1).
        """
        x = math.exp(entropy)
        freedom = max(3.0, self.independent - 2)
        deviation = self.error * math.sqrt(self.points / (self.points - 2))
        inflation = self.points / self.independent
        half = deviation * math.sqrt(inflation * (1 / self.points + (x - self.mean) ** 2 / self.spread))
        half *= student_quantile((1 + confidence) / 2, freedom)
        value = self.b - self.a * x
        return Forecast(value, value - half, value + half)


def fit_entropy_law(entropy: Sequence[float], accuracy: Sequence[float]) -> EntropyLaw | None:
    r"""Fit :math:`R = -a e^H + b` by least squares: a straight line in :math:`e^H`.

    Residuals of a run resemble those of the step before; with their correlation :math:`\rho` at a distance of one point
    n points count as :math:`n (1 - \rho) / (1 + \rho)`.

    Args:
        entropy: H of each point [nats], in the order of steps.
        accuracy: R of each point.

    Returns:
        The law; None with fewer than five points, or if the entropy has never moved.

    Example::

        >>> entropies = [1.5, 1.2, 0.9, 0.6, 0.4]
        >>> law = fit_entropy_law(entropies, [0.9 - 0.15 * math.exp(h) for h in entropies])
        >>> print(f"{law.a:.2f} {law.b:.2f} {law.forecast().value:.2f}")
        0.15 0.90 0.75

    Reference: "The Entropy Mechanism of RL for Reasoning LLMs" (arXiv 2505.22617), equation 6.
    """
    x, y = np.exp(np.asarray(entropy, dtype=np.float64)), np.asarray(accuracy, dtype=np.float64)
    if len(x) != len(y):
        raise ValueError(f"`entropy` has {len(x)} points and `accuracy` {len(y)}; give one of each a point.")
    if len(x) < LEAST_POINTS:
        return None
    dx, dy = x - x.mean(), y - y.mean()
    spread = float(dx @ dx)
    if not spread > 1e-12 * float(x @ x):
        return None
    slope = float(dx @ dy) / spread
    rest = dy - slope * dx
    total, squares = float(dy @ dy), float(rest @ rest)
    lag = float(rest[1:] @ rest[:-1]) / squares if squares > 0 else 0.0
    lag = min(max(lag, 0.0), 0.99)
    return EntropyLaw(
        a=-slope,
        b=float(y.mean() - slope * x.mean()),
        error=math.sqrt(squares / len(x)),
        explained=1 - squares / total if total > 0 else 1.0,
        points=len(x),
        mean=float(x.mean()),
        spread=spread,
        independent=max(LEAST_POINTS, len(x) * (1 - lag) / (1 + lag)),
    )
