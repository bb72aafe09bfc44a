import math
import random

import pytest

from litropy.callbacks.likelihood_over_optimisation import LikelihoodOverOptimisation, smooth


def messages(entropies, masses=None, rule=None):
    rule = rule or LikelihoodOverOptimisation()
    masses = masses or [0.9] * len(entropies)
    found = [(step, rule.update(step, *probe)) for step, probe in enumerate(zip(entropies, masses, strict=True))]
    return [(step, message) for step, message in found if message], rule


def noisy(curve, share, seed=0):
    generator = random.Random(seed)
    return [x * (1 + share * generator.gauss(0, 1)) for x in curve]


def hill(peak=100, n=250):
    """Rises from 0.8 to 1.4 nats, and falls to 0.7."""
    up = [0.8 + 0.6 * math.sin(math.pi / 2 * step / peak) for step in range(peak)]
    return up + [1.4 - 0.7 * min(1.0, (step - peak) / 100) for step in range(peak, n)]


def test_the_slope_is_that_of_least_squares():
    import numpy as np

    generator = random.Random(1)
    values = [generator.gauss(0, 1) + 0.1 * i for i in range(20)]
    steps = np.arange(20)
    (slope, _), covariance = np.polyfit(steps, values, 1, cov=True)
    assert smooth(values).t == pytest.approx(slope / covariance[0, 0] ** 0.5, rel=1e-9)
    assert smooth([2.0] * 5) == (2.0, 0.0)


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.06])
@pytest.mark.parametrize("seed", range(3))
def test_a_hill_has_one_turning_point(noise, seed):
    [(step, message)], rule = messages(noisy(hill(), noise, seed))
    assert 100 < step < 160
    assert rule.turned
    assert rule.level == 1
    assert rule.high_step == pytest.approx(100, abs=25)
    assert f"until about step {rule.high_step:.0f} and has fallen since" in message


@pytest.mark.parametrize("seed", range(5))
def test_runs_without_a_turn_are_silent(seed):
    falling = [0.3 + math.exp(-step / 80) for step in range(400)]
    plateau = [1.4 - math.exp(-step / 40) for step in range(600)]
    for curve in (falling, plateau, [0.0] * 100):
        found, rule = messages(noisy(curve, 0.03, seed))
        assert not found
        assert rule.level == 0


def test_a_second_hill_is_news_and_a_rise_ends_the_level():
    found, rule = messages(hill() + [0.7 + 0.6 * step / 60 for step in range(60)])
    assert len(found) == 1
    assert rule.level == 0
    found, rule = messages([1.3 - 0.6 * step / 60 for step in range(60)], rule=rule)
    assert len(found) == 1


def test_mass_that_falls_while_entropy_rises_is_reported_once():
    n = 120
    entropies = [1.0 + 0.5 * step / n for step in range(n)]
    masses = [0.95 - 0.2 * max(0, step - 40) / n for step in range(n)]
    [(step, message)], rule = messages(entropies, masses)
    assert 60 < step < 110
    assert "unlikely tokens" in message
    assert rule.level == 1
    assert messages(entropies, [0.95] * n)[0] == []
    # a model that becomes less sure of everything, as when it is new to a text, has not spread out its likeliest tokens
    assert messages([1.0] * n, masses)[0] == []


def test_what_is_not_finite_is_left_out():
    curve = hill()
    curve[50:60] = [math.nan] * 10
    assert len(messages(curve)[0]) == 1


def test_it_goes_on_from_its_state():
    curve = noisy(hill(), 0.03)
    whole, expected = messages(curve)
    first, rule = messages(curve[:120])
    resumed = LikelihoodOverOptimisation()
    resumed.load_state_dict(rule.state_dict())
    second = [(step, message) for step in range(120, 250) if (message := resumed.update(step, curve[step], 0.9))]
    assert first + second == whole
    assert resumed.state_dict() == expected.state_dict()
