"""What callbacks read from a policy: against transcriptions in plain Python, finite differences, and real runs."""

import itertools
import json
import math

import numpy as np
import pytest
import rlvr_problems as problems
import torch

from litropy.callbacks import CollapseDetector, EntropyChange, PolicyMonitor, SampleTable
from litropy.callbacks.policy_readings import PolicySample, PolicyUpdate
from litropy.callbacks.policy_statistics import (
    clip_shares,
    covariance_quantiles,
    entropy_change,
    masked_quantiles,
    phase_entropies,
    quadrant_shares,
    solution_counts,
)
from litropy.callbacks.sample_table import sample_table
from litropy.losses import linear_head_stats
from litropy.recipes import RLVR, LanguageModel
from litropy.recipes.rlvr_samples import Reward, RewardResult


class Generous(Reward):
    """Longer answers are better, so that every group has something to tell apart."""

    def __call__(self, samples, responses):
        return [RewardResult(len(r) + 0.1 * sum(map(ord, r)), len(r) > 2, r or None) for r in responses]


def fit(callbacks, ckpt_path=None, module=None, **options):
    torch.manual_seed(2)
    module = module or RLVR(
        config=problems.CONFIG, pad_vocab_to=1, learning_rate=1e-3, max_new_tokens=4, group_size=4, val_samples=2,
        mini_batch_size=2,
    )  # fmt: skip
    metrics = problems.Metrics()
    trainer = problems.trainer(callbacks=[*callbacks, metrics], limit_val_batches=0, **options)
    trainer.fit(module, datamodule=problems.Sums(reward=Generous()), ckpt_path=ckpt_path)
    return trainer, module, metrics.rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run that everything watches: its module, its metrics after each batch, and its callbacks."""
    callbacks = [
        PolicyMonitor(marker=[7]), EntropyChange(), SampleTable(every_n_steps=4, rows=3),
        CollapseDetector(every_n_steps=1),
    ]  # fmt: skip
    trainer, module, rows = fit(callbacks, default_root_dir=tmp_path_factory.mktemp("run"))
    return trainer, module, rows, callbacks


@pytest.fixture
def update():
    """Tokens of three responses under a tabular softmax: free logits at each position; and those logits."""
    generator = torch.Generator().manual_seed(3)
    old = 1.5 * torch.randn(3, 5, 9, generator=generator, dtype=torch.float64)
    new = old.clone()
    mask = torch.arange(5) < torch.tensor([5, 2, 4])[:, None]
    tokens = torch.randint(0, 9, (3, 5), generator=generator)
    names = ("logprob", "entropy", "entropy_drift")
    stats = linear_head_stats(old, torch.eye(9, dtype=torch.float64), tokens, stats=names)
    advantage = torch.tensor([1.0, -0.7, 0.0], dtype=torch.float64)[:, None].expand(3, 5)
    clipped = torch.zeros(3, 5, dtype=torch.bool)
    clipped[0, 1] = clipped[1, 0] = True
    made = PolicyUpdate(
        mask=mask, logprob=stats.logprob.double(), entropy=stats.entropy.double(),
        log_ratio=torch.zeros(3, 5, dtype=torch.float64), advantage=advantage,
        weight=torch.linspace(0.5, 1.5, 15, dtype=torch.float64).view(3, 5),
        slope=stats.entropy_drift.double()
        - stats.logprob.double().exp() * (stats.logprob.double() + stats.entropy.double()),
        clipped=clipped,
    )  # fmt: skip
    return made, new, tokens


def test_the_change_of_first_order_is_that_of_a_small_step(update):
    made, logits, tokens = update
    moving = made.mask & ~made.clipped
    leaf = logits.clone().requires_grad_()
    logprob = leaf.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.where(moving, made.weight * made.advantage * logprob, 0).sum().backward()

    def entropy(z):
        found = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
        return found[made.mask].mean()

    step = 1e-5
    change = (entropy(logits + step * leaf.grad) - entropy(logits - step * leaf.grad)) / (2 * step)
    assert float(entropy_change([made])) == pytest.approx(float(change), rel=1e-5)
    assert float(entropy_change([made, made])) == pytest.approx(2 * float(change), rel=1e-5)


def test_covariances_quadrants_and_clips(update):
    made, _, _ = update
    keep = made.mask.numpy()
    logp, advantage, entropy = (x.numpy()[keep] for x in (made.logprob, made.advantage, made.entropy))
    product = (logp - logp.mean()) * (advantage - advantage.mean())
    found = covariance_quantiles(made)
    assert float(found["mean"]) == pytest.approx(np.cov(logp, advantage, bias=True)[0, 1])
    nearest = {name: sorted(product)[round(q * 10)] for name, q in (("median", 0.5), ("top_20", 0.8), ("top_2", 0.98))}
    assert {name: float(found[name]) for name in nearest} == pytest.approx(nearest)
    counts = {name: round(11 * float(share)) for name, share in quadrant_shares(made).items()}
    assert counts == {
        "likely_up": sum((-logp < entropy) & (advantage > 0)),
        "unlikely_up": sum((-logp >= entropy) & (advantage > 0)),
        "likely_down": sum((-logp < entropy) & (advantage < 0)),
        "unlikely_down": sum((-logp >= entropy) & (advantage < 0)),
    }
    assert sum(counts.values()) == 7
    assert {name: round(11 * float(share)) for name, share in clip_shares(made).items()} == {"high": 1, "low": 1}


def test_nothing_gives_zero():
    empty = torch.zeros(2, 3, dtype=torch.bool)
    assert [float(x) for x in masked_quantiles(torch.ones(2, 3), empty, [0.1, 0.9])] == [0.0, 0.0]
    zero = torch.zeros(2, 3)
    nothing = PolicyUpdate(empty, zero, zero, zero, zero, zero, zero, None)
    values = [*covariance_quantiles(nothing).values(), *quadrant_shares(nothing).values(), entropy_change([nothing])]
    assert [float(value) for value in values] == [0.0] * len(values)
    assert clip_shares(nothing) == {}


def test_phases_end_at_the_marker():
    responses = torch.tensor([[3, 7, 8, 4, 0], [7, 3, 3, 3, 3], [3, 3, 3, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    entropy = torch.arange(15.0).view(3, 5)
    found = phase_entropies(responses, mask, entropy, [7, 8])
    assert float(found["thinking"]) == pytest.approx(np.mean([0, *range(5, 10), 10, 11, 12]))
    assert float(found["answer"]) == pytest.approx(3.0)


def test_solutions_count_by_how_often_they_come():
    def sample(answer, group, correct=True):
        return PolicySample("?", "!", 1.0, correct, answer, group)

    samples = [*(sample(a, 0) for a in "xxxy"), sample("z", 1), sample("w", 1, False), sample("v", 2, False)]
    effective, distinct, prompts = solution_counts(samples)
    assert effective == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)) + 1)
    assert (distinct, prompts) == (3.0, 2)
    assert solution_counts([]) == (0.0, 0.0, 0)


def test_a_run_is_watched(run):
    _, module, rows, (monitor, _, _, detector) = run
    found = module.policy_readings()
    assert len(found.updates) == 2
    mine = {name.split("/", 1)[1] for name in rows[-1] if name.startswith("quadrant/")}
    assert mine == {"likely_up", "unlikely_up", "likely_down", "unlikely_down"}
    first, second = (covariance_quantiles(each)["mean"] for each in found.updates)
    assert rows[-1]["covariance/mean"] == pytest.approx(float(first + second) / 2, rel=1e-5)
    lengths = found.mask.sum(-1).float()
    assert rows[-1]["length/max"] == lengths.max()
    assert rows[-1]["length/right"] == pytest.approx(float(lengths[found.correct].mean()))
    assert rows[-1]["clip/high"] + rows[-1]["clip/low"] == pytest.approx(rows[-1]["train/clipped_share"], abs=1e-6)
    assert 1 <= rows[-1]["solutions/effective"] <= rows[-1]["solutions/distinct"] <= 4
    assert {"entropy/thinking", "entropy/answer"} <= set(rows[-1])
    assert float(monitor.collapse_readings().values["output/entropy"]) == pytest.approx(rows[-1]["entropy/output"])
    assert detector.judge.output.peak == pytest.approx(max(row["entropy/output"] for row in rows))


def test_the_realised_change_is_that_of_the_logged_entropy(run):
    _, module, rows, _ = run
    assert "entropy_change/realised" not in rows[0]
    for before, after in itertools.pairwise(rows):
        realised = after["entropy/output"] - before["entropy/output"]
        assert after["entropy_change/realised"] == pytest.approx(realised, abs=1e-6)
    first, last = rows[0]["entropy_change/first_order"], rows[1]["entropy_change/realised"]
    assert rows[2]["entropy_change/predicted"] == pytest.approx(rows[1]["entropy_change/first_order"] * last / first)
    assert rows[-1]["entropy_change/first_order"] == pytest.approx(
        float(entropy_change(module.policy_readings().updates))
    )


def test_samples_are_written(run):
    _, _, _, (*_, table, _) = run
    records = [json.loads(line) for line in table.path.read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 0, 0, 4, 4, 4]
    assert len({record["prompt"] for record in records[:3]}) == 3
    assert set(records[0]) == {"step", "prompt", "response", "reward", "correct", "answer"}


def test_a_continued_run_is_watched_as_if_it_had_not_stopped(tmp_path):
    def watch():
        return [PolicyMonitor(), EntropyChange(), SampleTable(every_n_steps=4)]

    whole = fit(watch(), max_epochs=2, default_root_dir=tmp_path / "whole")[2]
    half, _, _ = fit(watch(), max_epochs=1, default_root_dir=tmp_path / "half")
    half.save_checkpoint(tmp_path / "half.ckpt")
    with (tmp_path / "half" / "samples.jsonl").open("a") as file:
        file.write('{"step": 8, "prompt": "written after the checkp')
    again = fit(watch(), tmp_path / "half.ckpt", max_epochs=2, default_root_dir=tmp_path / "half")[2]
    assert again[-1] == whole[-1]
    assert (tmp_path / "half" / "samples.jsonl").read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()


def test_a_table_keeps_its_shape():
    table = sample_table([PolicySample("a|b\nc", "\\|", 0.5, False, None, 0)])
    assert table.splitlines()[2:] == ["| a\\|b<br>c | \\\\\\| | 0.5 | False | None |"]


@pytest.mark.parametrize("callback", [PolicyMonitor, EntropyChange, SampleTable])
def test_other_modules_are_refused(callback):
    module = LanguageModel(config=problems.CONFIG)
    with pytest.raises(ValueError, match=r"LanguageModel has no `policy_readings`"):
        callback().on_train_start(None, module)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`marker` is empty"):
        PolicyMonitor(marker=[])
    with pytest.raises(ValueError, match="`rows` is 0"):
        SampleTable(rows=0)
