"""Each method's formula against a transcription in numpy and float64 that shares nothing with it but the batch."""

import math
from dataclasses import replace

import numpy as np
import pytest
import rlvr_problems as problems
import torch

from litropy.losses import HeadStats
from litropy.recipes import steering as s
from litropy.recipes.rlvr_update import cotangents
from litropy.recipes.steering.batch import UpdateBatch
from litropy.recipes.steering.guard import explain
from litropy.recipes.steering.objective import Methods, objective
from litropy.recipes.steering.selection import largest_share


@pytest.fixture(scope="module")
def rollouts():
    return problems.rollouts(3, 4, dtype=torch.float64)


@pytest.fixture(scope="module")
def batch(rollouts):
    generator = torch.Generator().manual_seed(8)

    def noise():
        return torch.randn(rollouts.mask.shape, generator=generator, dtype=torch.float64) * rollouts.mask

    current = HeadStats(logprob=rollouts.stats.logprob + 0.4 * noise(), entropy=noise().abs())
    return UpdateBatch(rollouts, noise() * 1.5, current)


def tokens(batch):
    """Every token as (row, position), and the numbers of the batch as arrays."""
    mask = batch.mask.numpy()
    places = list(zip(*np.nonzero(mask), strict=True))
    arrays = {
        "logp": batch.logprob.detach(), "old": batch.old, "A": batch.advantage, "H": batch.entropy.detach(),
        "mu": batch.rollouts.behaviour, "ref": batch.rollouts.reference,
    }  # fmt: skip
    return places, {name: value.numpy() for name, value in arrays.items()}


def rewards_by_group(rollouts):
    groups = {}
    for row, group in enumerate(rollouts.group.tolist()):
        groups.setdefault(group, []).append(row)
    return groups, rollouts.reward.numpy()


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (s.GRPO(), lambda r, others: (r - np.mean([r, *others])) / (np.std([r, *others], ddof=1) + 1e-6)),
        (s.DrGRPO(), lambda r, others: r - np.mean([r, *others])),
        (s.RLOO(), lambda r, others: r - np.mean(others)),
    ],
    ids=["grpo", "dr_grpo", "rloo"],
)
def test_advantages(rollouts, method, expected):
    rollouts = replace(rollouts, reward=rollouts.reward + 0.1 * torch.arange(len(rollouts)).remainder(3).double())
    found = method.advantages(rollouts)[:, 0].numpy()
    groups, rewards = rewards_by_group(rollouts)
    for rows in groups.values():
        for row in rows:
            others = [rewards[other] for other in rows if other != row]
            assert found[row] == pytest.approx(expected(rewards[row], others), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("method", [s.GRPO(), s.DrGRPO(), s.RLOO()])
def test_equal_rewards_have_no_advantage_whatever_the_rounding(rollouts, method):
    equal = replace(rollouts, reward=torch.full_like(rollouts.reward, 0.1).float())
    assert not method.advantages(equal).any()


def ppo(r, A, low, high, dual=None):
    loss = max(-r * A, -min(max(r, 1 - low), 1 + high) * A)
    return min(loss, -dual * A) if dual and A < 0 else loss


@pytest.mark.parametrize(
    ("clip", "bounds"),
    [
        (s.PPOClip(), (0.2, 0.2)),
        (s.PPOClip(0.2, 0.28), (0.2, 0.28)),
        (s.PPOClip(0.2, 0.2, 1.3), (0.2, 0.2, 1.3)),
    ],
)
@pytest.mark.parametrize("aggregation", [s.TokenMean(), s.SequenceMean(), s.SequenceSum(), s.ConstantLength(9)])
def test_clip_and_aggregation(batch, clip, bounds, aggregation):
    places, a = tokens(batch)
    rows, lengths = len(batch.rollouts), batch.rollouts.lengths.tolist()
    share = {
        "TokenMean": lambda i: 1 / len(places), "SequenceMean": lambda i: 1 / (rows * lengths[i]),
        "SequenceSum": lambda i: 1 / rows, "ConstantLength": lambda i: 1 / (rows * 9),
    }[type(aggregation).__name__]  # fmt: skip
    expected = sum(share(i) * ppo(math.exp(a["logp"][i, t] - a["old"][i, t]), a["A"][i, t], *bounds) for i, t in places)
    found = objective(Methods(clip=clip, aggregation=aggregation), batch)
    assert float(found.loss) == pytest.approx(expected, rel=1e-6)
    stopped = [
        (r > 1 + bounds[1] and A > 0) or (r < 1 - bounds[0] and A < 0) or (len(bounds) > 2 and A < 0 and r > bounds[2])
        for r, A in ((math.exp(a["logp"][p] - a["old"][p]), a["A"][p]) for p in places)
    ]
    assert 0 < sum(stopped) < len(places)
    assert float(found.terms["clipped_share"]) == pytest.approx(np.mean(stopped))


def test_gspo(batch):
    places, a = tokens(batch)
    mask, lengths = batch.mask.numpy(), batch.rollouts.lengths.tolist()
    ratio = [math.exp(((a["logp"] - a["old"]) * mask)[i].sum() / max(1, n)) for i, n in enumerate(lengths)]
    expected = sum(ppo(ratio[i], a["A"][i, t], 0.1, 0.1) / (len(ratio) * lengths[i]) for i, t in places)
    found, slopes = cotangents(Methods(clip=s.GSPO(0.1, 0.1)), batch)
    assert float(found.loss) == pytest.approx(expected, rel=1e-6)
    for i, t in places:  # the ratio's gradient reaches every token of its response, unless it is clipped
        A = a["A"][i, t]
        stopped = (A > 0 and ratio[i] > 1.1) or (A < 0 and ratio[i] < 0.9)
        slope = 0 if stopped else -ratio[i] * A / (len(ratio) * lengths[i])
        assert float(slopes["logprob"][i, t]) == pytest.approx(slope, rel=1e-6, abs=1e-12)


def test_cispo_keeps_the_gradient_of_every_token(batch):
    places, a = tokens(batch)
    _, slopes = cotangents(Methods(clip=s.CISPO(1.0, 0.28), aggregation=s.TokenMean()), batch)
    for p in places:
        weight = min(math.exp(a["logp"][p] - a["old"][p]), 1.28)
        assert float(slopes["logprob"][p]) == pytest.approx(-weight * a["A"][p] / len(places), rel=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_reference_kl(batch, estimator):
    places, a = tokens(batch)
    d = np.array([a["ref"][p] - a["logp"][p] for p in places])
    expected = 0.1 * np.mean({"k1": -d, "k2": d**2 / 2, "k3": np.exp(d) - d - 1}[estimator])
    methods = Methods(penalties=[s.ReferenceKL(0.1, estimator)], aggregation=s.TokenMean())
    found = objective(methods, batch)
    assert float(found.terms["penalty"]) == pytest.approx(expected, rel=1e-6)
    assert float(found.loss) == pytest.approx(float(found.terms["policy_loss"]) + expected, rel=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights(batch, level):
    places, a = tokens(batch)
    mask = batch.mask.numpy()
    log = (a["old"] - a["mu"]) * mask
    log = log if level == "token" else np.broadcast_to(log.sum(1, keepdims=True), log.shape)
    truncated = s.TruncatedImportance(1.2, level).weights(batch).numpy()
    masked = s.MaskedImportance(0.8, 1.3, level).weights(batch).numpy()
    dropped = 0
    for p in places:
        w = math.exp(log[p])
        assert truncated[p] == pytest.approx(min(w, 1.2), rel=1e-9)
        assert masked[p] == pytest.approx(w if 0.8 <= w <= 1.3 else 0, rel=1e-9)
        dropped += masked[p] == 0
    assert 0 < dropped < len(places)


@pytest.mark.parametrize("renormalise", [True, False])
def test_forking_tokens(batch, renormalise):
    places, a = tokens(batch)
    count = math.ceil(0.2 * len(places))
    threshold = sorted((a["H"][p] for p in places), reverse=True)[count - 1]
    chosen = [p for p in places if a["H"][p] >= threshold]
    found = objective(Methods(masks=[s.ForkingTokens(0.2, renormalise)], aggregation=s.TokenMean()), batch)
    assert sorted(zip(*np.nonzero(found.kept.numpy()), strict=True)) == sorted(chosen)
    total = sum(ppo(math.exp(a["logp"][p] - a["old"][p]), a["A"][p], 0.2, 0.2) for p in chosen)
    assert float(found.loss) == pytest.approx(total / len(chosen if renormalise else places), rel=1e-6)


def test_equal_values_are_chosen_together_and_padding_never():
    values = torch.tensor([1.0, 1.0 + 1e-7, 0.5, 9.0])
    mask = torch.tensor([True, True, True, False])
    assert largest_share(values, mask, 0.01).tolist() == [True, True, False, False]
    assert not largest_share(values, torch.zeros(4, dtype=torch.bool), 0.5).any()


def covariances(places, a):
    logp, A = (np.array([a[name][p] for p in places]) for name in ("logp", "A"))
    return (logp - logp.mean()) * (A - A.mean())


def test_clip_cov_draws_from_the_band_what_the_clip_has_left(batch):
    places, a = tokens(batch)
    found = dict(zip(places, covariances(places, a), strict=True))
    stopped = s.PPOClip().clipped(batch).numpy()
    band = {p for p in places if 0.1 < found[p] < 2 and not stopped[p]}
    method = s.ClipCov(share=0.1, low=0.1, high=2.0)
    draws = []
    for _ in range(2):
        kept = objective(Methods(masks=[method]), batch).kept.numpy()
        draws.append({p for p in places if not kept[p]})
        assert draws[-1] <= band
        assert len(draws[-1]) == min(len(band), int(0.1 * len(places)))
        method.after_step(batch)
    assert len(band) > len(draws[0])
    assert draws[0] != draws[1]
    none = objective(Methods(masks=[s.ClipCov(0.1, 100.0, 200.0)]), batch).kept
    assert torch.equal(none, batch.mask)


def test_kl_cov_penalises_the_largest_covariances(batch):
    places, a = tokens(batch)
    count = math.ceil(0.1 * len(places))
    order = np.argsort(-covariances(places, a))[:count]
    chosen = [places[k] for k in order]
    found, slopes = cotangents(
        Methods(penalties=[s.KLCov(0.1, 0.5)], clip=s.Unclipped(), aggregation=s.TokenMean()), batch
    )
    change = {p: a["logp"][p] - a["old"][p] for p in places}
    expected = 0.5 * sum(abs(change[p]) for p in chosen) / len(places)
    assert float(found.terms["penalty"]) == pytest.approx(expected, rel=1e-6)
    for p in places:
        slope = -math.exp(change[p]) * a["A"][p] + (0.5 * np.sign(change[p]) if p in chosen else 0)
        assert float(slopes["logprob"][p]) == pytest.approx(slope / len(places), rel=1e-6)


def test_entropy_bonus(batch):
    places, a = tokens(batch)
    found, slopes = cotangents(Methods(regularisers=[s.EntropyBonus(0.05)]), batch)
    assert float(found.terms["regulariser/EntropyBonus"]) == pytest.approx(-0.05 * np.mean([a["H"][p] for p in places]))
    assert float(slopes["entropy"][places[0]]) == pytest.approx(-0.05 / len(places))


def follow(controller, entropies):
    coefficients = []
    for entropy in entropies:
        measured = torch.tensor(entropy, dtype=torch.float64)
        coefficients.append(float(controller.coefficient(measured)))
        controller.update(measured)
    return coefficients


def test_skywork_steps_towards_the_target_and_acts_below_it_only():
    entropies = [0.1, 0.15, 0.3, 0.1, 0.1, 0.1, 0.1, 0.5, 0.1]
    expected, c = [], 0.0
    for entropy in entropies:
        expected.append(c if entropy <= 0.2 else 0.0)
        c = min(max(c + (0.002 if entropy < 0.2 else -0.002), 0.0), 0.005)
    assert follow(s.SkyworkController(0.2, 0.002, 0.0, 0.005), entropies) == pytest.approx(expected, abs=1e-15)
    assert max(expected) == 0.005


def test_pi_controller_and_its_anchor():
    entropies = [1.0, 0.8, 0.7, 1.3]
    expected, total = [], 0.0
    for entropy in entropies:
        expected.append(0.1 * (1.0 - entropy) + total)
        total += 0.01 * (1.0 - entropy)
    assert follow(s.PIController(1.0), entropies) == pytest.approx(expected, abs=1e-15)
    assert follow(s.PIController(None), entropies) == pytest.approx(expected, abs=1e-15)  # the first is the target


def test_a_saturated_controller_does_not_wind_up():
    controller = s.PIController(1.0, proportional_gain=0.0, integral_gain=0.01, low=-0.05, high=0.05)
    found = follow(controller, [0.0] * 100 + [2.0] * 3)
    assert found[99] == pytest.approx(0.05)
    assert found[-1] == pytest.approx(0.03)  # turns at once, where a wound-up integral would take 95 steps
    free = follow(s.PIController(1.0, 0.0, 0.01, -0.05, 0.05), [0.0] * 3)
    assert free == pytest.approx([0.0, 0.01, 0.02])


def test_dynamic_sampling_waits_for_enough_groups():
    rollouts = problems.rollouts(4, 4)
    solved = rollouts.group_mean(rollouts.correct.float())
    useful = set(rollouts.group[(solved > 0) & (solved < 1)].tolist())
    assert 0 < len(useful) < 4
    method = s.DynamicSampling(groups=2 * len(useful))
    assert method.select(rollouts) is None
    again = s.DynamicSampling(groups=2 * len(useful))
    again.load_state_dict(method.state_dict())
    later = replace(rollouts, group=rollouts.group + 100, row=rollouts.row + 1000)
    for waiting in (method, again):
        chosen = waiting.select(later)
        assert set(chosen.group.tolist()) == useful | {group + 100 for group in useful}
        assert all((chosen.group == group).sum() == 4 for group in useful)
        assert waiting.state_dict() == {"batches": 0, "kept": None}


def test_dynamic_sampling_gives_up_after_some_batches():
    rollouts = problems.rollouts(4, 4)
    nothing = replace(rollouts, correct=torch.ones_like(rollouts.correct))
    method = s.DynamicSampling(groups=4, max_batches=2)
    assert method.select(nothing) is None
    assert len(method.select(nothing)) == 0


def test_nothing_at_all_is_no_nan(batch):
    """Rows without tokens, and groups of one, give zeros."""
    empty = replace(batch.rollouts, mask=torch.zeros_like(batch.mask), group=torch.arange(len(batch.rollouts)))
    for clip in (s.PPOClip(), s.GSPO(), s.CISPO()):
        methods = Methods(
            clip=clip, masks=[s.ForkingTokens(), s.ClipCov()], penalties=[s.KLCov(), s.ReferenceKL()],
            regularisers=[s.EntropyBonus(0.1)], mismatch=s.TruncatedImportance(), aggregation=s.TokenMean(),
        )  # fmt: skip
        nothing = replace(batch, rollouts=empty, advantage=methods.advantages(empty))
        found, slopes = cotangents(methods, nothing)
        assert float(found.loss) == 0
        assert all(not slope.any() for slope in slopes.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: s.PPOClip(low=0.0), "`low`"),
        (lambda: s.PPOClip(dual=0.9), "`dual` is 0.9"),
        (lambda: s.ForkingTokens(0.0), "`share` is 0.0"),
        (lambda: s.ClipCov(low=5.0, high=1.0), "below `high`"),
        (lambda: s.EntropyBonus(), "either `coefficient` or `controller`"),
        (lambda: s.PIController(low=1.0, high=0.0), "above `high`"),
        (lambda: s.MaskedImportance(low=2.0), "below `high`"),
        (lambda: s.ReferenceKL(estimator="k4"), "choose 'k1'"),
        (lambda: s.DynamicSampling(groups=0), "`groups`"),
        (lambda: s.MinP(0.0), "`min_p` is 0.0"),
        (lambda: s.TopP(1.5), "`top_p` is 1.5"),
        (lambda: s.Sampler(0.0), "`temperature` is 0.0"),
        (lambda: s.ConstantLength(0), "`length` is 0"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("slots", "sampler", "one_update", "said"),
    [
        ({"penalties": [s.KLCov()], "clip": s.Unclipped()}, s.Sampler(), True, ["KLCov does nothing"]),
        ({"penalties": [s.KLCov()], "clip": s.Unclipped()}, s.Sampler(), False, []),
        ({"penalties": [s.KLCov()]}, s.Sampler(), False, ["bounds the chosen tokens twice"]),
        ({"clip": s.CISPO(), "masks": [s.ClipCov()]}, s.Sampler(), False, ["CISPO"]),
        ({"advantage": s.DrGRPO()}, s.Sampler(), True, ["length bias"]),
        ({"clip": s.GSPO(), "aggregation": s.TokenMean()}, s.Sampler(), True, ["one a response"]),
        ({"regularisers": [s.EntropyBonus(0.1), s.EntropyBonus(0.1)]}, s.Sampler(), True, ["add up"]),
        ({"penalties": [s.ReferenceKL(0.1, "k1")]}, s.Sampler(), True, ["mean 0"]),
        ({}, s.TopP(), True, ["leaves tokens out"]),
        ({"mismatch": s.TruncatedImportance()}, s.TopP(), True, []),
        ({}, s.Sampler(), True, []),
    ],
)  # fmt: skip
def test_guard(slots, sampler, one_update, said):
    sentences = explain(Methods(**slots), sampler, one_update)
    assert len(sentences) == len(said)
    assert all(words in sentence for words, sentence in zip(said, sentences, strict=True))
