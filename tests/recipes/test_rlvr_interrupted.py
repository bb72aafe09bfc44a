"""Runs on rewards in which something goes wrong: an engine that dies, a reward that fails, empty responses."""

import math

import pytest
import rlvr_problems as problems
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from litropy.recipes import RLVR, TaskDataModule
from litropy.recipes import steering as s
from litropy.recipes.rlvr_samples import Reward, RewardResult
from litropy.recipes.rlvr_sampling import HuggingFaceEngine


class Generous(Reward):
    """Longer answers are better; fails at every fifth sample if asked to."""

    def __init__(self, fails=None):
        self.fails = fails

    def __call__(self, samples, responses):
        values = [len(r) + 0.1 * sum(map(ord, r)) for r in responses]
        bad = [sample.sample_id % 5 == 0 for sample in samples]
        if self.fails == "raises" and any(bad):
            raise KeyError("no such key")
        if self.fails == "nan":
            values = [math.nan if b else v for b, v in zip(bad, values, strict=True)]
        return [RewardResult(v, len(r) > 2, r or None) for v, r in zip(values, responses, strict=True)]


class Mortal(HuggingFaceEngine):
    """Writes two prompts' responses at a time, and loses its server within a batch."""

    def __init__(self, parts=math.inf):
        super().__init__(max_rows=8)
        self.parts = parts

    def _generate(self, *arguments):
        self.parts -= 1
        if self.parts < 0:
            raise ConnectionError("lost the server")
        return super()._generate(*arguments)


def fit(engine, datamodule, folder=None, ckpt_path=None, **options):
    torch.manual_seed(2)
    settings = {"config": problems.CONFIG, "pad_vocab_to": 1, "learning_rate": 1e-3, "max_new_tokens": 4}
    module = RLVR(**settings | {"group_size": 4, "engine": engine, "reward": Generous()} | options)
    metrics = problems.Metrics()
    saves = [] if folder is None else [ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=0)]
    trainer = problems.trainer(callbacks=[metrics, *saves], limit_val_batches=0, enable_checkpointing=bool(saves))
    trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
    return module, metrics.rows


def test_a_run_whose_engine_dies_goes_on_from_its_checkpoint(tmp_path):
    def options():  # something that remembers in each slot that can
        return {
            "mini_batch_size": 2, "sampler": s.AdaptiveTemperature(strength=0.5), "masks": [s.ClipCov(0.2, -1.0, 5.0)],
            "data": s.RecentSampleRecovery(groups=3),
            "regularisers": [s.EntropyBonus(controller=s.SkyworkController(None, 0.01, 0.0, 0.5)), s.SIREN(0.1)],
        }  # fmt: skip

    def data():
        return TaskDataModule(num_train=24, batch_size=4, num_val=2)

    whole, rows = fit(Mortal(), data(), **options())
    with pytest.raises(RuntimeError, match=r"Mortal failed on 4 prompts \(ConnectionError: lost the server\)"):
        fit(Mortal(parts=7), data(), tmp_path, **options())
    resumed, later = fit(Mortal(), data(), ckpt_path=tmp_path / "last.ckpt", **options())
    assert later == rows[-len(later) :]
    assert 0 < len(later) < len(rows)
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert all(math.isfinite(row["rollout/on_policy_z"]) for row in rows), "every batch is checked"


@pytest.mark.parametrize("fails", ["raises", "nan"])
def test_a_run_goes_on_where_a_reward_fails_or_names_the_sample(fails):
    with pytest.raises(ValueError, match=r"for sample 0 of task 'sum', prompt '0='"):
        fit(None, problems.Sums(), reward=Generous(fails))
    with pytest.warns(UserWarning, match="It counts as wrong"):
        _, rows = fit(None, problems.Sums(), reward=Generous(fails), invalid_reward="wrong")
    assert len(rows) == 3
    assert all(math.isfinite(value) for row in rows for value in row.values())


class Silent(problems.Scripted):
    """Every second response has no token."""

    def generate(self, policy, request, sampler):
        found = super().generate(policy, request, sampler)
        mask = found.mask & (torch.arange(len(found.mask)) % 2 == 0)[:, None]
        return found._replace(mask=mask, responses=found.responses * mask, behaviour=found.behaviour * mask)


@pytest.mark.filterwarnings("ignore")
def test_empty_responses_are_no_nan():
    steering = {"shaping": [s.PEAR([5])], "weights": [s.STEER()], "regularisers": [s.SIREN(), s.TEA()]}
    module, rows = fit(Silent(), problems.Sums(), **steering)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert rows[-1]["train/grad_norm"] > 0
