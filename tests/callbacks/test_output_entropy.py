"""The arithmetic of the output monitor, without a trainer."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from litropy.callbacks.logit_transforms import logit_transforms
from litropy.callbacks.on_policy_score import OnPolicyScore
from litropy.callbacks.output_entropy import (
    OutputSums,
    choose_tokens,
    exact_sums,
    logit_statistics,
    sampled_sums,
    top_sums,
)
from litropy.callbacks.output_entropy_logits import find_heads, next_tokens
from litropy.callbacks.output_entropy_probe import OutputProbe
from litropy.callbacks.output_entropy_trend import OutputTrend
from litropy.losses import linear_head_stats
from litropy.testing import assert_within_budget, tiny_causal_lm


def direct(z, target, k):
    """Every statistic from all logits in float64."""
    log_p = z.double().log_softmax(-1)
    p = log_p.exp()
    surprise = torch.where(p > 0, -log_p, 0.0)
    top = p.topk(min(k, z.shape[-1])).values
    q = top / top.sum(-1, keepdim=True)
    entropy = (p * surprise).sum(-1)
    return {
        "entropy": entropy,
        "varentropy": (p * (surprise - entropy[:, None]) ** 2).sum(-1),
        "lse": z.double().logsumexp(-1),
        "max_logprob": log_p.amax(-1),
        "topk_entropy": torch.special.entr(q).sum(-1),
        "topk_mass": top.sum(-1),
        "logprob": log_p[torch.arange(len(z)), target.clamp(min=0)],
    }


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_of_logits_equal_those_in_float64(scale, offset, dtype):
    z = (scale * torch.randn(50, 211) + offset).to(dtype)
    target = torch.randint(211, (50,))
    found = logit_statistics(z, target, 10)
    for name, truth in direct(z, target, 10).items():
        assert_within_budget(name, getattr(found, name), truth.float(), truth, slack=2e-5)


def test_blocks_of_rows_change_nothing(monkeypatch):
    z, target = torch.randn(37, 19), torch.randint(19, (37,))
    whole = logit_statistics(z, target, 3)
    monkeypatch.setattr("litropy.callbacks.output_entropy._BLOCK", 4 * 19 * 5)
    parts = logit_statistics(z, target, 3)
    for name, value in vars(whole).items():
        assert value is None or torch.equal(value, getattr(parts, name))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.floats(0, 1e4), st.integers(0, 5), st.integers(0, 10**6))
def test_wild_logits_give_finite_statistics(width, scale, forbidden, seed):
    z = scale * torch.randn(4, width, generator=torch.Generator().manual_seed(seed))
    z[:, : min(forbidden, width - 1)] = -math.inf
    stats = logit_statistics(z, None, 10)
    for name, value in vars(stats).items():
        assert value is None or torch.isfinite(value).all(), name
    assert (stats.entropy >= -1e-6).all()
    assert (stats.entropy <= math.log(width) + 1e-5).all()
    assert (stats.topk_mass <= 1 + 1e-5).all()


def test_the_logits_and_the_head_give_the_same_numbers():
    h, w, target = torch.randn(30, 8), torch.randn(53, 8), torch.randint(53, (30,))
    names = ("entropy", "varentropy", "lse", "max_logprob", "topk_entropy", "topk_mass", "logprob")
    fused = linear_head_stats(h, w, target, stats=names, top_k=7)
    stored = logit_statistics(h @ w.T, target, 7)
    for name in names:
        torch.testing.assert_close(getattr(fused, name), getattr(stored, name), rtol=1e-4, atol=1e-5)


def test_means_of_a_full_sample_are_those_of_all_tokens_that_count():
    z, target = 3 * torch.randn(40, 31), torch.randint(31, (40,))
    target[::3] = -100
    z[::6] = math.nan  # ignored ones may be anything
    stats = logit_statistics(z, target, 10)
    sample = choose_tokens(40, target >= 0, 1024, torch.Generator())
    order = sample.places
    mine = type(stats)(**{name: None if x is None else x[order] for name, x in vars(stats).items()})
    means = sampled_sums(mine, sample).means()
    keep = target >= 0
    truth = direct(z[keep], target[keep], 10)
    top = z[keep].double().softmax(-1).topk(10).values
    expected = {
        "entropy": truth["entropy"],
        "varentropy": truth["varentropy"],
        "lse": truth["lse"],
        "max_probability": truth["max_logprob"].exp(),
        "top_entropy": truth["topk_entropy"],
        "top_entropy_raw": -(top * top.log()).sum(-1),
        "top_mass": truth["topk_mass"],
        "cross_entropy": -truth["logprob"],
        "calibration_gap": -truth["logprob"] - truth["entropy"],
    }
    assert means.keys() == expected.keys()
    for name, value in expected.items():
        assert float(means[name]) == pytest.approx(float(value.mean()), rel=1e-5, abs=1e-5), name
    exact = exact_sums(stats, keep).plus(top_sums(mine, sample)).means()
    for name, value in means.items():
        torch.testing.assert_close(exact[name], value, rtol=1e-5, atol=1e-6)


def test_a_sample_stands_for_all_tokens_without_bias():
    values, valid = torch.arange(50.0), torch.arange(50) % 3 > 0
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(2000):
        sample = choose_tokens(50, valid, 5, generator)
        assert sample.counts.sum() == 5
        assert len(set(sample.places.tolist())) == 5
        estimates.append(float((values[sample.places] * sample.counts).sum() * sample.share))
    error = torch.tensor(estimates).std() / 2000**0.5
    assert abs(sum(estimates) / 2000 - float(values[valid].sum())) < 4 * error
    none = choose_tokens(50, torch.zeros(50, dtype=torch.bool), 5, generator)
    assert none.share == none.counts.sum() == 0


def test_a_probe_without_tokens_repeats_the_last_one_and_nan_shows():
    trend = OutputTrend()

    def probe(tokens, lse):
        sums = {"tokens": tokens, "targets": tokens, "lse": tokens * lse, "cross_entropy": tokens * 2 * lse}
        return trend.update(OutputSums.of(**{name: torch.tensor(float(x)) for name, x in sums.items()}))

    assert probe(0, 0.0)["lse"].isnan()
    assert probe(4, 5.0)["lse_drift"] == 0
    state = trend.state_dict()
    assert probe(2, 8.0)["lse_drift"] == 3
    repeated = probe(0, 0.0)
    assert [float(repeated[name]) for name in ("lse", "lse_drift", "cross_entropy")] == [8, 3, 16]
    assert probe(2, math.nan)["lse"].isnan()
    resumed = OutputTrend()
    resumed.load_state_dict(state)
    trend = resumed
    assert [float(x) for x in (probe(0, 0.0)["lse"], probe(2, 8.0)["lse_drift"])] == [5, 3]


def test_next_tokens_follow_what_the_model_got():
    ids, labels = torch.tensor([[5, 6, 7, 0]]), torch.tensor([[-100, -100, 7, -100]])
    mask = torch.tensor([[1, 1, 1, 0]])
    given = {"input_ids": ids, "attention_mask": mask}
    assert next_tokens(given | {"labels": labels}, (1, 4)).tolist() == [[-100, 7, -100, -100]]
    assert next_tokens(given, (1, 4)).tolist() == [[6, 7, -100, -100]]
    assert next_tokens({"input_ids": ids}, (1, 4)).tolist() == [[6, 7, 0, -100]]
    assert next_tokens(given | {"logits_to_keep": 2}, (1, 2)).tolist() == [[-100, -100]]
    assert next_tokens({"shift_labels": labels}, (1, 4)).tolist() == labels.tolist()
    assert next_tokens({"input_ids": ids}, (1, 7)) is None
    assert next_tokens({"inputs_embeds": torch.ones(1, 4, 8)}, (1, 4)) is None


def test_heads_are_found_where_text_is_generated():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.policy, self.reference = tiny_causal_lm("gpt2"), tiny_causal_lm("llama")
            self.backbone = tiny_causal_lm("llama").model

    model = Two()
    places = find_heads(model)
    assert [place.head for place in places] == [model.policy.lm_head, model.reference.lm_head]
    assert [place.around for place in places] == [(model.policy,), (model.reference,)]
    assert find_heads(model, "policy.lm_head")[0].around == (model.policy,)
    with pytest.raises(ValueError, match=r"`head` is 'out'.* such as 'policy.lm_head', 'reference.lm_head', "):
        find_heads(model, "out")


def test_configs_tell_what_may_happen_to_logits():
    class Config:
        final_logit_softcapping = 30.0
        dim_model_base = 16

    assert logit_transforms(Config, 64) == [(None, 1.0), (None, 0.25), (30.0, 1.0), (30.0, 0.25)]


def draw(temperature, probes=20, tokens=1000, seed=0, top_p=None):
    """Scores of text that is drawn from random distributions, probe by probe."""
    generator = torch.Generator().manual_seed(seed)
    score, found = OnPolicyScore(), []
    for _ in range(probes):
        z = 2 * torch.randn(tokens, 50, generator=generator)
        p = (z / temperature).softmax(-1)
        if top_p is not None:
            ordered = p.sort(-1, descending=True)
            keep = ordered.values.cumsum(-1) - ordered.values < top_p
            p = torch.zeros_like(p).scatter(-1, ordered.indices, ordered.values * keep)
        y = torch.multinomial(p, 1, generator=generator)[:, 0]
        stats = logit_statistics(z, y, 10)
        sums = exact_sums(stats, torch.ones(tokens, dtype=torch.bool))
        found.append(float(score.update(sums.excess, sums.excess_variance)))
    return score, found


def test_scores_of_a_models_own_text_are_standard_normal_and_of_other_text_are_not():
    own = [z for seed in range(4) for z in draw(1.0, seed=seed)[1]]
    assert max(map(abs, own)) < 4
    last = torch.tensor([draw(1.0, probes=2, tokens=100, seed=100 + seed)[1][-1] for seed in range(100)])
    assert abs(last.mean()) < 0.4
    assert 0.8 < last.std() < 1.2
    assert draw(0.9)[1][-1] < -8
    assert draw(1.1)[1][-1] > 8
    assert draw(1.0, top_p=0.95)[1][-1] < -8


def test_a_score_goes_on_from_its_state_and_says_what_it_means():
    score, _ = draw(1.0, probes=3)
    resumed = OnPolicyScore()
    resumed.load_state_dict(score.state_dict())
    excess, variance = torch.tensor(12.0), torch.tensor(900.0)
    assert resumed.update(excess, variance) == score.update(excess, variance)
    fresh = OnPolicyScore()
    fresh.load_state_dict(OnPolicyScore().state_dict())
    assert fresh.update(torch.tensor(0.0), torch.tensor(0.0)).isnan()
    assert score.judge(3.9) is score.judge(-3.9) is score.judge(math.nan) is None
    assert "top-p" in score.judge(-4.1)
    assert "older" in score.judge(4.1)


class NoWaiting(TorchDispatchMode):
    """Refuses operators that would make the host wait for a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = [x for x in args[1] if x is not None and x.dtype == torch.bool] if name == "index" else []
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal") or masks:
            raise AssertionError(f"{name} waits for the device")
        return function(*args, **(kwargs or {}))


def test_a_probe_never_waits_for_the_device():
    z, target = torch.randn(2, 20, 31), torch.randint(-1, 31, (2, 20))
    h, w = torch.randn(40, 8), torch.randn(31, 8)
    names = ("entropy", "varentropy", "lse", "max_logprob", "logprob")
    stats = linear_head_stats(h, w, target.flatten(), stats=names)
    top = linear_head_stats(h, w, stats=("topk_entropy", "topk_mass"), top_k=5)
    probe = OutputProbe([], torch.device("cpu"), top_k=5, temperature=0.5, is_training=lambda: True)
    trend, score = OutputTrend(), OnPolicyScore()
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        float(z.sum())
    with probe.open(rows=64, seed=0), NoWaiting():
        for _ in range(2):
            probe._see_logits(z, target)
            valid = target.flatten() >= 0
            sample = choose_tokens(40, valid, 64, torch.Generator())
            probe._add(exact_sums(stats, valid).plus(top_sums(top, sample)))
            sums = probe.take()
            trend.update(sums)
            score.update(sums.excess, sums.excess_variance)
