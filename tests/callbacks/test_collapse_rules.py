"""The arithmetic of the collapse rules, on numbers made up for each."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litropy.callbacks.collapse_attention import AttentionCollapse, AttentionFall, LogitGrowth, SharpAttention
from litropy.callbacks.collapse_baseline import Drift, Hold, median_and_scale
from litropy.callbacks.collapse_judge import CollapseJudge
from litropy.callbacks.collapse_loss import LossHistory, SpikeRule, improvement
from litropy.callbacks.collapse_rules import GradientFloor, LossSpike, OutputEntropy, RepresentationRank


def history(losses, share=0.4):
    loss = LossHistory(share)
    for step, value in enumerate(losses):
        loss.add(step, value)
    return loss


def noisy(values, seed=0, scale=0.01):
    return np.asarray(values) + np.random.default_rng(seed).normal(0, scale, len(values))


def autocorrelated(steps, seed, memory=0.9):
    noise, x = np.random.default_rng(seed).normal(0, 1, steps), np.zeros(steps)
    for step in range(1, steps):
        x[step] = memory * x[step - 1] + math.sqrt(1 - memory**2) * noise[step]
    return x


# baselines


def test_scale_is_that_of_a_normal_distribution_and_deaf_to_outliers():
    values = np.random.default_rng(0).normal(3, 2, 20_000)
    values[:500] = 1e6
    median, scale = median_and_scale(values)
    assert median == pytest.approx(3, abs=0.1)
    assert scale == pytest.approx(2, rel=0.05)


def test_a_condition_must_last_in_probes_and_in_steps():
    often, rarely = Hold(probes=3, steps=10), Hold(probes=3, steps=10)
    assert [bool(often.update(step, [True])[0]) for step in range(12)] == [False] * 10 + [True] * 2
    assert [bool(rarely.update(step, [True])[0]) for step in range(0, 50, 10)] == [False, False, True, True, True]
    assert often.since[0] == 0


def test_a_condition_that_flickers_does_not_last():
    hold = Hold(probes=3, steps=0)
    assert not any(hold.update(step, [step % 3 < 2])[0] for step in range(100))


def test_drift_rarely_fires_on_autocorrelated_noise():
    # means of 1000 steps after the baseline's 500, in either direction; the rule asks for two such at once
    series = np.stack([autocorrelated(1500, seed) for seed in range(100)], axis=1)
    drift, fired = Drift(floor=1e-3), np.zeros(100, dtype=bool)
    for step, values in enumerate(series):
        fired |= np.asarray(drift.update(step, values)) != 0
    assert fired.mean() <= 0.1


@pytest.mark.parametrize("direction", [-1, 1])
@pytest.mark.parametrize("every", [1, 10])
def test_drift_finds_a_shift_of_three_sigma_in_its_direction(direction, every):
    drift = Drift(floor=1e-3)
    series = np.stack([autocorrelated(1000, seed) for seed in range(20)], axis=1)
    series[600:] += 3 * direction
    found = np.full(20, np.nan)
    for step in range(0, 1000, every):
        moved = np.asarray(drift.update(step, series[step]))
        found = np.where((moved == direction) & np.isnan(found), step, found)
    delays = found - 600
    assert np.median(delays) <= 140


def test_drift_takes_a_new_baseline_and_survives_nan():
    drift = Drift(floor=0.01, block=1, skip=0)
    values = [0.9] * 22 + [math.nan] + [0.6] * 60
    moved = [drift.update(step, [value])[0] for step, value in enumerate(values)]
    assert [step for step, m in enumerate(moved) if m] == [24]  # once: 0.6 is what it compares with afterwards


# loss


def test_improvement_is_the_least_squares_slope():
    losses = noisy(4 - 0.02 * np.arange(50))
    rate = improvement(range(50), losses)
    (slope, _), covariance = np.polyfit(range(50), losses, 1, cov="unscaled")
    residual = losses - np.polyval(np.polyfit(range(50), losses, 1), range(50))
    assert rate.value == pytest.approx(-slope)
    assert rate.error == pytest.approx(math.sqrt(covariance[0, 0] * (residual**2).sum() / 48))


@pytest.mark.parametrize(
    ("after", "verdict"), [(0.0, "stalled"), (0.002, "stalled"), (0.007, "unknown"), (0.03, "learning")]
)
def test_a_loss_is_compared_with_its_own_past(after, verdict):
    steps = np.arange(100)
    losses = noisy(np.where(steps < 50, 4 - 0.01 * steps, 3.5 - after * (steps - 50)))
    trend = history(losses).trend(50)
    assert trend.verdict == verdict
    assert trend.before == pytest.approx(0.01, abs=0.001)
    assert trend.after == pytest.approx(after, abs=0.001)


def test_too_few_steps_give_no_verdict():
    losses = 4 - 0.01 * np.arange(60)
    assert history(losses[:69]).trend(50).verdict == "unknown"
    assert history([]).trend(0).verdict == "unknown"
    assert history(losses).trend(math.nan).verdict == "unknown"


def test_a_plateau_before_is_no_rate_to_fall_short_of():
    steps = np.arange(100)
    assert history(noisy(np.full(100, 4.0))).trend(50).verdict == "unknown"
    assert history(noisy(np.where(steps < 50, 4.0, 4 - 0.02 * (steps - 50)))).trend(50).verdict == "learning"


def test_a_loss_that_falls_as_a_power_of_the_step_never_stalls():
    losses = noisy(2 + 8 * np.arange(1, 1001) ** -0.5, scale=0.02)
    verdicts = {history(losses[:stop]).trend(onset).verdict for onset in (400, 800) for stop in range(450, 1000, 50)}
    assert "stalled" not in verdicts


def test_a_learned_loss_is_done_learning():
    losses = np.concatenate([np.linspace(4, 0.01, 50), np.full(50, 0.01)])
    assert history(losses).trend(60).verdict == "learning"


def test_spikes_are_found_but_not_in_the_first_steps_nor_near_zero():
    smooth = noisy(np.full(100, 2.5), scale=0.02)
    assert not any(map(SpikeRule().update, smooth))
    spiky = smooth.copy()
    spiky[60:66] += 1.0
    rule = SpikeRule()
    found = [step for step, loss in enumerate(spiky) if rule.update(loss)]
    assert 62 <= found[0] <= 64
    start = smooth.copy()
    start[3:6] += 3
    assert not any(map(SpikeRule().update, start))
    learned = np.concatenate([np.full(30, 4.0), np.full(50, 1e-4), np.full(20, 5e-3)])
    assert not any(map(SpikeRule().update, learned))


def test_one_bad_batch_is_no_spike_and_a_loss_that_is_not_finite_is_critical():
    rule = LossSpike()
    losses = noisy(np.full(100, 2.5), scale=0.02)
    losses[50] = 50.0
    assert not any(map(rule.update, losses))
    assert [finding.level for finding in rule.update(math.nan)] == [2]
    assert rule.update(2.5) == []


# attention


def attention(entropy, logit, layers=2, heads=4):
    """Probes in which layer 1 changes and layer 0 does not."""
    h, s = np.full((layers, heads), 0.9), np.full((layers, heads), 5.0)
    h[1], s[1] = entropy, logit
    return h, s


def fall(steps, entropy, logit, losses):
    rule, found = AttentionFall(0.5, 20.0), []
    loss = LossHistory(0.4)
    for step in range(steps):
        loss.add(step, losses(step))
        found.append(rule.update(step, ("a", "b"), *attention(entropy(step), logit(step)), loss))
    return found


def ramp(start, stop, first, last):
    return lambda step: float(np.interp(step, [first, last], [start, stop]))


def test_a_fall_warns_where_it_is_and_becomes_critical_with_a_stalled_loss():
    found = fall(200, ramp(0.9, 0.05, 50, 80), ramp(5, 300, 50, 80), lambda step: 4 - 0.01 * min(step, 70))
    levels = [max((finding.level for finding in now), default=0) for now in found]
    assert set(levels[:60]) == {0}
    assert levels[75] == 1
    assert levels[-1] == 2
    assert {finding.layer for now in found for finding in now} == {"b"}


def test_a_fall_that_pays_off_ends_its_warning():
    found = fall(200, ramp(0.9, 0.05, 50, 80), ramp(5, 300, 50, 80), lambda step: 4 - 0.02 * max(step - 60, 0))
    levels = [max((finding.level for finding in now), default=0) for now in found]
    assert max(levels) == 1
    assert set(levels[110:]) == {0}


@pytest.mark.parametrize(
    ("entropy", "logit"),
    [
        (lambda step: 0.9, ramp(5, 1000, 50, 80)),  # logits grow, attention stays
        (ramp(0.9, 0.05, 50, 80), lambda step: 5.0),  # sharp at small logits, as at few keys
        (lambda step: 0.05, ramp(5, 300, 50, 80)),  # sharp from the start
    ],
)
def test_one_of_both_is_no_fall(entropy, logit):
    found = fall(200, entropy, logit, lambda step: 4 - 0.01 * min(step, 70))
    assert not any(found)


def test_heads_that_a_layer_does_not_have_are_left_out():
    entropy, logit = attention(0.01, 300.0)
    entropy[:, 2:] = logit[:, 2:] = np.nan
    none_h, none_s = np.vstack([entropy, np.full((1, 4), np.nan)]), np.vstack([logit, np.full((1, 4), np.nan)])
    sharp, collapse = SharpAttention(), AttentionCollapse()
    loss = history([4.0] * 30)
    start = np.where(np.isnan(none_h), np.nan, 0.9)
    collapse.update(0, (0, 1, 2), start, none_s, loss)
    for step in range(1, 6):
        found = sharp.update(step, (0, 1, 2), none_h, none_s)
        both = collapse.update(step, (0, 1, 2), none_h, none_s, loss)
    assert [(finding.layer, finding.level) for finding in found] == [(1, 1)]
    assert "2 of 2 heads of layer 1" in found[0].message
    assert "2 of 4 attention heads" in both[0].message


def test_growth_predicts_when_logits_reach_ten_thousand():
    rule = LogitGrowth(20.0)
    for step in range(60):
        logits = np.full((1, 3), 5.0)
        logits[0, 1] = 5 * 1.1**step
        found = rule.update(step, (7,), logits)
    left = math.log(1e4 / (5 * 1.1**59)) / math.log(1.1)
    assert (found[0].layer, found[0].head) == (7, 1)
    assert f"doubles every {math.log(2) / math.log(1.1):.0f} steps: 10,000 in {left:.0f} steps" in found[0].message


def test_slow_growth_and_small_logits_are_fine():
    for logit in (lambda step: 30 * 1.01**step, lambda step: 1e-3 * 1.1**step):
        rule = LogitGrowth(20.0)
        assert not any(rule.update(step, (0,), np.full((1, 2), logit(step))) for step in range(100))


# representations, outputs, gradients


def test_rank_one_warns_then_becomes_critical_if_the_loss_stalls():
    rule, loss, levels = RepresentationRank(), LossHistory(0.4), []
    for step in range(120):
        loss.add(step, 4 - 0.01 * min(step, 60))
        rank = 1.02 if step >= 50 else 20.0
        found = rule.update(step, (3,), np.array([rank]), np.array([0.99]), loss)
        levels.append(max((finding.level for finding in found), default=0))
    assert levels.index(1) == 60
    assert 80 <= levels.index(2) <= 95
    healthy = RepresentationRank()
    assert not any(healthy.update(step, (3,), np.array([6.0]), np.array([0.99]), loss) for step in range(100))


def test_a_surer_output_than_it_is_right_warns_unless_all_is_learned():
    rule, loss = OutputEntropy(), history([4.0] * 30)
    levels = [max((f.level for f in rule.update(step, 0.5, 2.0, loss)), default=0) for step in range(60)]
    assert levels.index(1) == 30
    assert max(levels) == 1
    learned = history([4.0] * 30 + [0.02] * 30)
    rule = OutputEntropy()
    assert not any(rule.update(step, 0.001, 0.02, learned) for step in range(60))
    rule = OutputEntropy()
    assert not any(rule.update(step, 1.8, 2.0, loss) for step in range(60))


def test_without_targets_entropy_is_compared_with_itself():
    rule, loss = OutputEntropy(), LossHistory(0.4)
    entropy = [1.0] * 20 + [0.2] * 60 + [0.01] * 60
    levels = [max((f.level for f in rule.update(step, h, None, loss)), default=0) for step, h in enumerate(entropy)]
    assert levels.index(1) == 50
    assert levels.index(2) == 90
    rule = OutputEntropy()
    entropy = noisy([1.0] * 600 + [2.0] * 200)
    rising = [bool(rule.update(step, h, None, loss)) for step, h in enumerate(entropy)]
    assert not any(rising[:600])
    assert any(rising[600:])


def test_a_tenth_of_the_weights_must_be_at_the_floor():
    loss, names = history([4.0] * 30), tuple(f"w{i}" for i in range(20))
    for small, alarm in ((1, False), (4, True)):
        rule, ratio = GradientFloor(), np.full(20, 1e4)
        ratio[:small] = [2.0, 3.0, 4.0, 5.0][:small]
        found = [rule.update(step, names, ratio, loss) for step in range(20)]
        assert bool(found[-1]) == alarm
    assert "4 of 20 weight matrices" in found[-1][0].message
    assert found[-1][0].message.endswith("in w0")
    zero, rule = np.zeros(20), GradientFloor()
    assert not any(rule.update(step, names, zero, loss) for step in range(20))
    rule = GradientFloor()
    assert not any(rule.update(step, names, ratio, history([4.0] * 30 + [0.01] * 10)) for step in range(20))


numbers = st.floats(width=32)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_wild_numbers_neither_raise_nor_spoil_the_state(data):
    judge = CollapseJudge()
    for step in range(data.draw(st.integers(1, 60))):
        wild = np.array(data.draw(st.lists(numbers, min_size=4, max_size=4))).reshape(2, 2)
        with np.errstate(all="ignore"):
            judge.observe_loss(step, float(wild[0, 0]))
            judge.observe(step, {"attention/entropy": wild, "attention/max_logit": -wild}, (0, "x"))
            judge.observe(
                step,
                {"representation/effective_rank": wild[0], "representation/mean_cosine": wild[1]},
                (0, "x"),
            )
            judge.observe(step, {"output/entropy": wild[0, 0]}, ())
            judge.observe(step, {"gradient/rms_over_eps": wild[0]}, ("a", "b"))
    state = judge.state_dict()
    again = CollapseJudge()
    again.load_state_dict(json.loads(json.dumps(state)))
    assert json.dumps(again.state_dict()) == json.dumps(state)
    assert judge.level in (0, 1, 2)
