"""LearningRateBackoff: the rate that the optimiser steps with, whatever the scheduler, and after a checkpoint."""

import importlib.util
import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule

from litropy.callbacks.learning_rate_backoff import Backoff, LearningRateBackoff

spec = importlib.util.spec_from_file_location("remedy_runs", Path(__file__).with_name("remedy_runs.py"))
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")

SCHEDULERS = {
    "closed form": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "recursive": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    "none": None,
}


class Weight(LightningModule):
    """A weight whose gradient is 1, so that a step of SGD moves it by the learning rate."""

    def __init__(self, scheduler="none", rate=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.scheduler, self.rate, self.path = scheduler, rate, [0.0]

    def training_step(self, batch, batch_idx):
        return self.weight * 1.0

    def on_train_batch_end(self, *_):
        if self.trainer.global_step >= len(self.path):
            self.path.append(self.weight.item())

    @property
    def rates(self):
        return [before - after for before, after in itertools.pairwise(self.path)]

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([self.weight], self.rate)
        if SCHEDULERS[self.scheduler] is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": SCHEDULERS[self.scheduler](optimizer), "interval": "step"},
        }


def rates(callbacks, steps, module=None, **options):
    module, trainer = runs.train(
        None, callbacks, steps, module or Weight(), data=torch.utils.data.DataLoader(torch.zeros(100)), **options
    )
    return module.rates, trainer


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_factor_and_schedule_multiply(scheduler):
    backoff = LearningRateBackoff(factor=0.01, hold_steps=2, recovery_steps=4)
    plain, _ = rates([], 10, Weight(scheduler))
    ours, trainer = rates([runs.Alarms([backoff], steps=[1])], 10, Weight(scheduler))
    # an alarm in step 1: steps 2 to 4 at the lowest rate, then a factor of 10^(1/2) a step
    expected = [1, 1, 0.01, 0.01, 0.01, 0.01**0.75, 0.1, 0.01**0.25, 1, 1]
    assert ours == pytest.approx([factor * rate for factor, rate in zip(expected, plain, strict=True)])
    assert float(trainer.callback_metrics["train/learning_rate_factor"]) == 1


def test_the_scheduler_never_sees_the_factor():
    backoff = LearningRateBackoff(factor=0.01)
    _, plain = rates([], 6, Weight("recursive"))
    _, ours = rates([runs.Alarms([backoff], steps=[1])], 6, Weight("recursive"))
    assert ours.optimizers[0].param_groups[0]["lr"] == plain.optimizers[0].param_groups[0]["lr"]


def test_accumulation_counts_optimiser_steps():
    backoff = LearningRateBackoff(factor=0.1, hold_steps=1, recovery_steps=1)
    found, _ = rates([runs.Alarms([backoff], steps=[1])], 5, accumulate_grad_batches=3)
    assert found == pytest.approx([1, 1, 0.1, 0.1, 1])


def test_a_rate_that_is_a_tensor_stays_the_same_tensor():
    class TensorRate(Weight):
        def configure_optimizers(self):
            self.tensor = torch.tensor(1.0, dtype=torch.float64)
            return torch.optim.SGD([self.weight], self.tensor)

    module = TensorRate()
    found, trainer = rates([runs.Alarms([LearningRateBackoff(factor=0.1)], steps=[0])], 3, module)
    assert found == pytest.approx([1, 0.1, 0.1])
    assert trainer.optimizers[0].param_groups[0]["lr"] is module.tensor
    assert module.tensor.item() == 1


def test_warnings_are_left_to_others_unless_asked():
    warning = runs.Alarm(0, 1, "logit_growth", 0, 0, "")
    assert rates([runs.Alarms([LearningRateBackoff()], [0], warning)], 2)[0] == pytest.approx([1, 1])
    assert rates([runs.Alarms([LearningRateBackoff(level=1)], [0], warning)], 2)[0] == pytest.approx([1, 0.1])


def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path):
    def alarms(steps):
        return runs.Alarms([LearningRateBackoff(factor=0.01, hold_steps=1, recovery_steps=6)], steps)

    whole, _ = rates([alarms([1])], 8, Weight("recursive"))
    _, trainer = rates([alarms([1])], 4, Weight("recursive"))
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    module = Weight("recursive")
    module.path = [0.0] * 4 + [-sum(whole[:4])]
    resumed, _ = rates([alarms([])], 8, module, ckpt_path=tmp_path / "four.ckpt")
    assert resumed[4:] == pytest.approx(whole[4:], abs=1e-15)


def test_an_exception_in_the_middle_of_a_step_leaves_the_rate_as_it_was():
    class Failing(Weight):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 2:
                raise RuntimeError("stop")
            return super().training_step(batch, batch_idx)

    optimizers = []
    Failing.on_train_start = lambda self: optimizers.extend(self.trainer.optimizers)
    with pytest.raises(RuntimeError, match="stop"):
        rates([runs.Alarms([LearningRateBackoff(factor=0.1)], steps=[0])], 4, Failing())
    assert optimizers[0].param_groups[0]["lr"] == 1.0


@given(
    factor=st.floats(0.01, 0.9), hold=st.integers(1, 20), recovery=st.integers(1, 50),
    floor=st.floats(1e-4, 1.0), gaps=st.lists(st.integers(0, 60), max_size=12),
)  # fmt: skip
def test_the_factor_stays_between_floor_and_one_and_recovers(factor, hold, recovery, floor, gaps):
    backoff, step = Backoff(factor, hold, recovery, floor), 0
    for gap in gaps:
        step += gap
        before = backoff.at(step)
        fell = backoff.alarm(step)
        assert backoff.at(step) == pytest.approx(max(min(floor, before), before * factor) if fell else before)
        assert min(floor, 1.0) * (1 - 1e-9) <= backoff.at(step) <= 1
    path = [backoff.at(step + ahead) for ahead in range(hold + recovery + 1)]
    assert all(later >= earlier for earlier, later in itertools.pairwise(path))
    assert path[-1] == 1
    assert math.isfinite(sum(path))


@pytest.mark.parametrize(
    "wrong", [{"factor": 1.0}, {"factor": 0.0}, {"min_factor": 0}, {"hold_steps": 0}, {"recovery_steps": 0}]
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LearningRateBackoff(**wrong)
