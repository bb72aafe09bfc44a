"""The law R = -a exp(H) + b: coefficients, ceiling and interval from points, and from what a run logs."""

import math

import numpy as np
import pytest
import rlvr_problems as problems
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from litropy.callbacks import EntropyLawForecast
from litropy.callbacks.entropy_law import fit_entropy_law, student_quantile


def curve(n, noise=0.0, seed=0, correlation=0.0):
    """Entropy that falls, and accuracy by the law with a = 0.1 and b = 0.8."""
    generator = np.random.default_rng(seed)
    entropy = 0.05 + 1.6 * np.exp(-np.arange(n) / (0.5 * n))
    drawn = generator.normal(0, noise, n)
    for place in range(1, n):
        drawn[place] = correlation * drawn[place - 1] + math.sqrt(1 - correlation**2) * drawn[place]
    return entropy, 0.8 - 0.1 * np.exp(entropy) + drawn


def test_it_is_the_least_squares_line():
    entropy, accuracy = curve(60, noise=0.02)
    law = fit_entropy_law(entropy, accuracy)
    (slope, intercept), residuals, *_ = np.polyfit(np.exp(entropy), accuracy, 1, full=True)
    np.testing.assert_allclose([-law.a, law.b], [slope, intercept], rtol=1e-9)
    np.testing.assert_allclose(law.error, math.sqrt(residuals[0] / 60), rtol=1e-9)
    np.testing.assert_allclose(law.forecast().value, slope + intercept, rtol=1e-9)
    np.testing.assert_allclose(law.forecast(0.7).value, slope * math.exp(0.7) + intercept, rtol=1e-9)


def test_the_start_of_a_run_forecasts_its_end():
    entropy, accuracy = curve(200, noise=0.005)
    early = fit_entropy_law(entropy[:40], accuracy[:40])
    found = early.forecast(float(entropy[-1]))
    assert found.low < 0.8 - 0.1 * math.exp(entropy[-1]) < found.high
    assert found.high - found.low < 0.05


@pytest.mark.parametrize("correlation", [0.0, 0.7])
def test_the_interval_holds_the_ceiling_as_often_as_it_says(correlation):
    held = 0
    for seed in range(200):
        found = fit_entropy_law(*curve(60, 0.02, seed, correlation)).forecast(0.0, 0.9)
        held += found.low < 0.7 < found.high
    assert 160 <= held <= 198


def test_quantiles_of_student():
    for freedom, truth in ((3, 3.1824), (5, 2.5706), (30, 2.0423)):
        assert student_quantile(0.975, freedom) == pytest.approx(truth, rel=0.01)


def test_there_is_no_law_without_points_or_change():
    assert fit_entropy_law([1.0, 0.5, 0.4, 0.3], [0.1, 0.2, 0.3, 0.4]) is None
    assert fit_entropy_law([0.5] * 9, np.linspace(0, 1, 9)) is None
    with pytest.raises(ValueError, match="9 points and `accuracy` 8"):
        fit_entropy_law([0.5] * 9, [0.5] * 8)


class Logs(LightningModule):
    """Logs a curve that follows the law, point after point; validates on it as well."""

    def __init__(self, missing=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.curve, self.missing = curve(24), missing

    def training_step(self, batch, batch_idx):
        if not self.missing:
            entropy, accuracy = (values[self.global_step] for values in self.curve)
            self.log_dict({"entropy/output": torch.tensor(entropy), "reward/correct": torch.tensor(accuracy)})
        return self.weight.square()

    def validation_step(self, batch, batch_idx):
        self.log("val/pass_at_1", torch.tensor(self.curve[1][max(0, self.global_step - 1)]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(callback, module=None, ckpt_path=None, **options):
    loader = DataLoader(torch.zeros(12, 1))
    trainer = problems.trainer(callbacks=[callback], log_every_n_steps=1, **options)
    trainer.fit(module or Logs(), loader, DataLoader(torch.zeros(1, 1)), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(("accuracy", "points"), [("reward/correct", 12), ("val/pass_at_1", 6)])
def test_a_run_logs_its_ceiling(accuracy, points):
    callback = EntropyLawForecast(accuracy=accuracy)
    logged = fit(callback, val_check_interval=2).callback_metrics
    assert len(callback.points) == points
    assert callback.forecast().value == pytest.approx(0.7, abs=1e-5)
    for name, value in (("a", 0.1), ("b", 0.8), ("ceiling", 0.7), ("explained", 1.0)):
        assert float(logged[f"entropy_law/{name}"]) == pytest.approx(value, abs=1e-4)
    assert logged["entropy_law/ceiling_low"] <= logged["entropy_law/ceiling"] <= logged["entropy_law/ceiling_high"]


def test_a_continued_run_has_the_points_of_the_first(tmp_path):
    whole, first, second = EntropyLawForecast(), EntropyLawForecast(), EntropyLawForecast()
    fit(whole, max_epochs=2)
    fit(first).save_checkpoint(tmp_path / "half.ckpt")
    fit(second, ckpt_path=tmp_path / "half.ckpt", max_epochs=2)
    assert (len(first.points), len(second.points)) == (12, 24)
    assert second.points == whole.points
    assert second.law == whole.law


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`confidence` is 95"):
        EntropyLawForecast(confidence=95)
    with pytest.warns(UserWarning, match="found no 'reward/correct' together with 'entropy/output'"):
        fit(EntropyLawForecast(), Logs(missing=True), limit_val_batches=0)
