"""The rules on real training runs: early where something collapses, silent where nothing does."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from litropy.callbacks.collapse_judge import CollapseJudge
from litropy.callbacks.collapse_loss import SpikeRule, improvement


def load_runs():
    path = Path(__file__).with_name("collapse_runs.py")
    spec = importlib.util.spec_from_file_location("collapse_runs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runs = load_runs()


def judge_run(run, every=1, attention=True, representation=True, **options):
    """Feed a run to the rules, with probes every so many steps; returns them and the level after each step."""
    judge, levels = CollapseJudge(**options), []
    layers = tuple(range(len(run.attention[0]["attention/entropy"])))
    for step, loss in enumerate(run.losses):
        judge.observe_loss(step, loss)
        if attention and step % every == 0:
            judge.observe(step, run.attention[step], layers)
        if representation and step in run.representation and step % every == 0:
            judge.observe(step, run.representation[step], layers)
        levels.append(judge.level)
    return judge, levels


def first(judge, level, *rules):
    """Step of the first alarm of a level (by some of the rules); None if there is none."""
    steps = [alarm.step for alarm in judge.book.alarms if alarm.level == level and (not rules or alarm.rule in rules)]
    return min(steps, default=None)


def step_when_the_loss_shows_it(losses):
    """First step at which a look at the loss alone raises suspicion: it spikes, or improves at a fifth of the pace of
    the first twenty steps.
    """
    spike, pace = SpikeRule(), improvement(range(20), losses[:20]).value
    for step, loss in enumerate(losses):
        slow = step >= 40 and improvement(range(20), losses[step - 19 : step + 1]).value < pace / 5
        if spike.update(loss) or slow:
            return step
    return len(losses)


@pytest.mark.parametrize("every", [1, 10])
def test_a_healthy_run_raises_no_alarm(every):
    judge, levels = judge_run(runs.train("healthy", 150, batch=8), every)
    assert judge.book.alarms == []
    assert set(levels) == {0}


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_collapse_is_seen_early_and_before_the_loss_shows_it(seed, every):
    run = runs.train("collapse", 140, seed)
    judge, levels = judge_run(run, every)
    assert run.attention[-1]["attention/entropy"].mean() < 0.15  # it is one
    warned, sure = first(judge, 1), first(judge, 2)
    assert warned <= (20 if every == 1 else 40)
    assert warned < step_when_the_loss_shows_it(run.losses)
    # the loss still falls a little, and never spikes
    assert np.mean(run.losses[-10:]) < np.mean(run.losses[-50:-40]) - 0.1
    assert first(judge, 1, "loss_spike") is None
    assert sure <= (100 if every == 1 else 130)
    assert levels[-1] == 2


def test_a_collapse_at_a_higher_rate_is_critical_at_once():
    judge, _ = judge_run(runs.train("full", 60, batch=8), representation=False)
    assert first(judge, 1) <= 10
    assert first(judge, 2) <= 45


@pytest.mark.parametrize("every", [1, 10])
def test_a_sharp_start_that_trains_well_is_only_a_warning(every):
    run = runs.train("sharp", 190)
    judge, _ = judge_run(run, every)
    assert np.mean(run.losses[-10:]) < 3.0
    assert first(judge, 1, "sharp_attention") <= (6 if every == 1 else 20)
    assert first(judge, 2) is None


@pytest.mark.parametrize("every", [1, 10])
def test_a_copying_model_sharpens_without_a_critical_alarm(every):
    run = runs.train("copy", 160)
    judge, levels = judge_run(run, every)
    assert np.mean(run.losses[-10:]) < 0.1
    assert run.attention[-1]["attention/entropy"].mean() < 0.6 * run.attention[0]["attention/entropy"].mean()
    assert first(judge, 2) is None
    assert levels[-1] == 0


def test_rank_collapse_is_seen_by_representations_where_attention_looks_healthy():
    run = runs.train("post_ln", 60)
    assert run.attention[-1]["attention/entropy"].mean() > 0.8
    attention, levels = judge_run(run, representation=False)
    assert attention.book.alarms == []
    assert set(levels) == {0}
    judge, _ = judge_run(run)
    assert first(judge, 1, "representation_rank") <= 20
    assert first(judge, 2, "representation_rank") <= 45
    alarm = next(alarm for alarm in judge.book.alarms if alarm.level == 2)
    assert alarm.layer in (1, 2, 3)
    assert alarm.head is None
    assert "nearly the same vector" in alarm.message


def test_alarms_say_where_and_why():
    judge, _ = judge_run(runs.train("collapse", 140))
    alarm = judge.book.alarms[0]
    assert (alarm.level, alarm.rule, alarm.layer) == (1, "attention_entropy", 0)
    assert alarm.head == int(np.argmin(runs.train("collapse", 140).attention[alarm.step]["attention/entropy"][0]))
    assert "attention entropy of layer 0" in alarm.message
    assert "down from" in alarm.message


def test_ignored_rules_are_silent():
    run = runs.train("collapse", 140)
    judge, _ = judge_run(run, ignore=["attention_entropy", "attention_collapse", "sharp_attention"])
    assert {alarm.rule for alarm in judge.book.alarms} == {"logit_growth"}


def test_a_judge_goes_on_from_its_state_as_if_nothing_had_happened():
    run = runs.train("collapse", 140)
    whole, _ = judge_run(run)
    layers = tuple(range(4))
    for stop in (14, 27, 60):
        judge = CollapseJudge()
        for step, loss in enumerate(run.losses):
            if step == stop:
                state = json.loads(json.dumps(judge.state_dict()))
                judge = CollapseJudge()
                judge.load_state_dict(state)
            judge.observe_loss(step, loss)
            judge.observe(step, run.attention[step], layers)
            if step in run.representation:
                judge.observe(step, run.representation[step], layers)
        assert judge.book.alarms == whole.book.alarms
        assert json.dumps(judge.state_dict()) == json.dumps(whole.state_dict())
