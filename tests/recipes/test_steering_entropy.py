"""Masks, weights, clips, regularisers and advantages by entropy, against transcriptions in plain Python and float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import rlvr_problems as problems
import torch

from litropy.losses import HeadStats, linear_head_stats
from litropy.recipes import steering as s
from litropy.recipes.rlvr_update import cotangents
from litropy.recipes.steering.batch import UpdateBatch
from litropy.recipes.steering.guard import explain
from litropy.recipes.steering.objective import Methods, objective


@pytest.fixture(scope="module")
def batch():
    """Statistics that belong together: of logits that are drawn, before and after an update."""
    rollouts = problems.rollouts(3, 4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(6)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = 2.5 * draw(*rollouts.mask.shape, 16)
    target = torch.where(rollouts.mask, rollouts.responses, -100)
    names = ("logprob", "entropy", "nucleus_entropy", "entropy_drift")

    def stats(z):
        return linear_head_stats(z, torch.eye(16, dtype=torch.float64), target, stats=names, top_p=0.8)

    found = replace(rollouts, stats=stats(old))
    return UpdateBatch(found, 1.5 * draw(*rollouts.mask.shape), stats(old + 0.25 * draw(*old.shape)))


def tokens(batch):
    """Every token as (row, position), and the numbers of the batch as arrays."""
    places = list(zip(*np.nonzero(batch.mask.numpy()), strict=True))
    arrays = {
        "logp": batch.logprob, "old": batch.old, "A": batch.advantage, "H": batch.entropy,
        "old H": batch.rollouts.stats.entropy, "HS": batch.current.nucleus_entropy, "S2": batch.current.entropy_drift,
    }  # fmt: skip
    return places, {name: value.detach().numpy() for name, value in arrays.items()}


def of_places(places, values, mask):
    """An array with values at the places, and that nothing else was chosen."""
    full = np.zeros(mask.shape)
    full[tuple(np.array(places).T)] = values
    return full


def hapo(a, places, released=False):
    """HAPO's h of each token, step by step as the paper has it."""
    logs = {p: math.log(max(a["H"][p], 1e-8)) for p in places}
    pivot = sorted(logs.values())[round(0.8 * (len(logs) - 1))]
    spread = math.sqrt(np.mean([(x - pivot) ** 2 for x in logs.values()]))
    h = {p: (x - pivot) / spread for p, x in logs.items()}
    low = min(h.values()) if released else abs(min(h.values()))
    return {p: x / max(h.values()) if x > 0 else x / low for p, x in h.items()}


def quantile_sets(batch, a, quantile):
    """SIREN's mean over rows, and which tokens it is made of."""
    rows, chosen = [], []
    for i, n in enumerate(batch.rollouts.lengths.tolist()):
        values = a["HS"][i, :n]
        picked = [t for t in range(n) if values[t] > np.quantile(values, quantile)]
        if picked:
            rows.append(values[picked].mean())
            chosen.append([(i, t) for t in picked])
    return np.mean(rows), chosen


def test_siren(batch):
    _, a = tokens(batch)
    method = s.SIREN(0.3, 0.8, 0.6)
    before = replace(batch, current=batch.rollouts.stats)
    anchor, _ = quantile_sets(batch, {"HS": batch.rollouts.stats.nucleus_entropy.numpy()}, 0.6)
    assert float(method.loss(before)) == 0
    mean, chosen = quantile_sets(batch, a, 0.6)
    found, slopes = cotangents(Methods(regularisers=[method]), batch)
    loss = 0.3 * (mean - anchor) ** 2
    assert loss > 1e-6
    assert float(found.terms["regulariser/SIREN"]) == pytest.approx(loss, rel=1e-9)
    expected = np.zeros(batch.mask.shape)
    for row in chosen:
        for p in row:
            expected[p] = 0.6 * (mean - anchor) / (len(chosen) * len(row))
    assert slopes["nucleus_entropy"].numpy() == pytest.approx(expected, abs=1e-12)
    again = s.SIREN(0.3, 0.8, 0.6)
    again.load_state_dict(method.state_dict())
    assert float(again.loss(batch)) == pytest.approx(loss, rel=1e-12)


def test_siren_asks_for_its_nucleus():
    for released, kind in ((False, "closed"), (True, "open")):
        method = s.SIREN(top_p=0.7, released=released)
        assert (method.statistics, method.nucleus_mass, method.nucleus) == (("nucleus_entropy",), 0.7, kind)


@pytest.mark.parametrize("target", [0.1, 5.0])
def test_ter(batch, target):
    places, a = tokens(batch)
    found, slopes = cotangents(Methods(regularisers=[s.TER(0.2, target)]), batch)
    mean = np.mean([a["H"][p] for p in places])
    assert float(found.terms["regulariser/TER"]) == pytest.approx(0.2 * abs(mean - target), rel=1e-9)
    sign = 1 if mean > target else -1
    assert slopes["entropy"][batch.mask].tolist() == pytest.approx([sign * 0.2 / len(places)] * len(places))


@pytest.mark.parametrize("released", [False, True])
def test_tea(batch, released):
    places, a = tokens(batch)
    logp, A = (np.array([a[name][p] for p in places]) for name in ("logp", "A"))
    c = dict(zip(places, (logp - logp.mean()) * (A - A.mean()), strict=True))
    total = {i: sum(math.exp(c[p]) for p in places if p[0] == i) for i, _ in places}
    weight = {p: min(2.0 * math.exp(c[p]) / total[p[0]], 0.8) for p in places}
    found, slopes = cotangents(Methods(regularisers=[s.TEA(2.0, 0.8, released)]), batch)
    expected = -np.mean([weight[p] * a["H"][p] for p in places])
    assert float(found.terms["regulariser/TEA"]) == pytest.approx(expected, rel=1e-9)
    assert 0 < sum(w == 0.8 for w in weight.values()) < len(places)
    slope = of_places(places, [-weight[p] / len(places) for p in places], batch.mask)
    assert slopes["entropy"].numpy() == pytest.approx(slope, rel=1e-9)
    plain = cotangents(Methods(), batch)[1]["logprob"]
    assert torch.allclose(slopes["logprob"], plain, rtol=1e-9) != released


def first_order_change(z, token, size):
    """Change of the entropy of softmax(z) for a step of ``size`` along the gradient of the token's log-probability."""

    def entropy(z):
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        return -(p * np.log(p)).sum()

    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    step = -p
    step[token] += 1
    return (entropy(z + size * step) - entropy(z - size * step)) / (2 * size)


def test_the_exact_change_of_entropy_is_that_of_the_softmax():
    """Against finite differences; the paper's form is that of the token's own logit."""
    rows = problems.rollouts(2, 2, dtype=torch.float64)[torch.tensor([1])]
    rows = replace(rows, mask=torch.ones(1, 7, dtype=torch.bool), responses=torch.arange(7)[None])
    z = 2 * torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    names = ("logprob", "entropy", "entropy_drift")
    current = linear_head_stats(z, torch.eye(16, dtype=torch.float64), rows.responses, stats=names)
    made = UpdateBatch(replace(rows, stats=current), torch.ones(1, 7, dtype=torch.float64), current)
    exact, paper = s.STEER(exact=True).change(made)[0], s.STEER().change(made)[0]
    for t in range(7):
        slope = first_order_change(z[0, t].numpy(), t, 1e-4)
        assert float(exact[t]) == pytest.approx(slope, rel=1e-6, abs=1e-10)
        p, H = math.exp(float(current.logprob[0, t])), float(current.entropy[0, t])
        assert float(paper[t]) == pytest.approx(-p * (1 - p) * (math.log(p) + H), rel=1e-9)


@pytest.mark.parametrize("form", ["paper", "exact", "released"])
def test_steer(batch, form):
    places, a = tokens(batch)
    stopped = {
        p for p in places
        if (a["A"][p] > 0 and a["logp"][p] - a["old"][p] > math.log(1.2))
        or (a["A"][p] < 0 and a["logp"][p] - a["old"][p] < math.log(0.8))
    }  # fmt: skip
    size = {}
    for place in places:
        logp, old, A, H = (a[name][place] for name in ("logp", "old", "A", "H"))
        p, r = math.exp(logp), math.exp(logp - old)
        if form == "paper":
            change = r * A * p * (1 - p) * (logp + H)
        elif form == "exact":
            change = r * A * (p * (logp + H) - a["S2"][place])
        else:  # with the further 1 / p, and the entropy of the pass before the update
            change = A / math.exp(old) * p * (1 - p) * (logp + a["old H"][place])
        size[place] = 0 if place in stopped and form != "released" else abs(change)
    most = max(size.values())
    made = s.STEER(0.6, exact=form == "exact", released=form == "released")
    assert made.statistics == (("entropy_drift",) if form == "exact" else ())
    weight = objective(Methods(weights=[made]), batch).weight.numpy()
    assert 0 < len(stopped) < len(places)
    for p in places:
        assert weight[p] == pytest.approx(math.exp(math.log(0.6) * size[p] / most), rel=1e-9)
    assert min(weight[p] for p in places) == pytest.approx(0.6)


def test_steer_without_any_change(batch):
    still = replace(batch, advantage=torch.zeros_like(batch.advantage))
    for released in (False, True):
        assert bool((s.STEER(released=released).weights(still) == 1).all())


@pytest.mark.parametrize("released", [False, True])
def test_advantage_redistribution(batch, released):
    places, a = tokens(batch)
    h = hapo(a, places, released)
    weight = s.AdvantageRedistribution(0.7, 0.2, 0.3, released=released).weights(batch).numpy()
    kinds = set()
    for p in places:
        r = math.exp(a["logp"][p] - a["old"][p])
        inside = 0.9 <= r <= 1.15
        acts = (h[p] > 0 and not inside) or (h[p] <= 0 and inside)
        assert weight[p] == pytest.approx(1 + 0.7 * h[p] if acts else 1, abs=1e-12)
        kinds.add((h[p] < 0, inside))
    assert len(kinds) == (2 if released else 4)  # of the release, none is below 0


@pytest.mark.parametrize("gate", ["response", "batch"])
def test_mastered_tokens(batch, gate):
    places, a = tokens(batch)
    lengths = batch.rollouts.lengths.tolist()
    mean = {i: a["H"][i, :n].mean() for i, n in enumerate(lengths) if n}
    target = float(np.median(list(mean.values())))
    whole = np.mean([a["H"][p] for p in places])
    for sigma in (target, 2 * whole):
        expected = {
            p for p in places
            if not (batch.rollouts.correct[p[0]] and math.exp(a["logp"][p]) >= 0.05
                    and (mean[p[0]] if gate == "response" else whole) < sigma)
        }  # fmt: skip
        method = s.MasteredTokens(0.05, sigma, gate)
        found = objective(Methods(masks=[method], aggregation=s.TokenMean()), batch)
        assert {tuple(p) for p in np.argwhere(found.kept.numpy())} == expected
    assert len(expected) < len(places)
    total = sum(ppo(a, p, 0.2, 0.2) for p in expected)  # over all tokens, those left out included
    assert float(found.loss) == pytest.approx(total / len(places), rel=1e-6)


def ppo(a, p, low, high, dual=None):
    r, A = math.exp(a["logp"][p] - a["old"][p]), a["A"][p]
    loss = max(-r * A, -min(max(r, 1 - low), 1 + high) * A)
    return min(loss, -dual * A) if dual and A < 0 else loss


@pytest.mark.parametrize("dual", [None, 1.4])
def test_ce_gppo(batch, dual):
    places, a = tokens(batch)
    _, slopes = cotangents(Methods(clip=s.CEGPPO(0.2, 0.1, 0.75, 0.9, dual), aggregation=s.TokenMean()), batch)
    losses = s.CEGPPO(0.2, 0.1, 0.75, 0.9, dual).losses(batch).numpy()
    kinds = set()
    for p in places:
        r, A = math.exp(a["logp"][p] - a["old"][p]), a["A"][p]
        if A < 0 and r < 0.8:
            size, kind = 0.75 * 0.8, "below"
        elif A > 0 and r > 1.1:
            size, kind = 0.9 * 1.1, "above"
        else:
            size, kind = r, "inside"
        loss, slope = -size * A, -size * A
        if dual and A < 0 and -dual * A < loss:
            loss, slope, kind = -dual * A, 0, "dual"
        kinds.add(kind)
        assert losses[p] == pytest.approx(loss, rel=1e-9)
        assert float(slopes["logprob"][p]) == pytest.approx(slope / len(places), rel=1e-6, abs=1e-12)
    assert len(kinds) == (4 if dual else 3)


@pytest.mark.parametrize("released", [False, True])
def test_adaptive_clip(batch, released):
    places, a = tokens(batch)
    h = hapo(a, places, released)
    method = s.AdaptiveClip(0.1, 0.15, 0.9, dual=1.5, released=released)
    found, slopes = cotangents(Methods(clip=method, aggregation=s.TokenMean()), batch)
    total, stopped = 0.0, 0
    for p in places:
        low = 0.1 * (1 - 0.9 * h[p]) if h[p] <= 0 else 0.1
        high = 0.15 * (1 + 0.9 * h[p]) if h[p] > 0 else 0.15
        r, A = math.exp(a["logp"][p] - a["old"][p]), a["A"][p]
        outside = (A > 0 and r > 1 + high) or (A < 0 and (r < 1 - low or r > 1.5))
        slope = 0 if outside else -r * A / len(places)
        assert float(slopes["logprob"][p]) == pytest.approx(slope, rel=1e-6, abs=1e-12)
        total, stopped = total + ppo(a, p, low, high, 1.5), stopped + outside
    assert float(found.loss) == pytest.approx(total / len(places), rel=1e-6)
    assert float(found.terms["clipped_share"]) == pytest.approx(stopped / len(places))
    assert 0 < stopped < len(places)


def groups_of(rollouts):
    groups = {}
    for row, group in enumerate(rollouts.group.tolist()):
        groups.setdefault(group, []).append(row)
    return groups.values()


def test_token_group_average(batch):
    rollouts = batch.rollouts
    rollouts = replace(rollouts, reward=rollouts.reward + 0.1 * torch.arange(12).remainder(5))
    lengths, reward = rollouts.lengths.tolist(), rollouts.reward.tolist()
    fell_back = []
    for bound in (5.0, 1.2):
        found = s.TokenGroupAverage(bound).advantages(rollouts)[:, 0].tolist()
        for rows in groups_of(rollouts):
            each = [reward[i] for i in rows for _ in range(lengths[i])]
            A = [(reward[i] - np.mean(each)) / (np.std(each) + 1e-6) for i in rows]
            falls_back = max(map(abs, A)) >= bound
            if falls_back:
                R = [reward[i] for i in rows]
                A = [(x - np.mean(R)) / (np.std(R, ddof=1) + 1e-6) for x in R]
            fell_back.append(falls_back)
            assert [found[i] for i in rows] == pytest.approx(A, rel=1e-9)
    assert len(set(fell_back)) == 2


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0)])
def test_pshw(batch, bounds):
    low, high = bounds
    rollouts = replace(batch.rollouts, reward=torch.where(batch.rollouts.correct, high, low).double())
    found = s.PSHW(low=low, high=high).advantages(rollouts)[:, 0].tolist()
    for rows in groups_of(rollouts):
        R = [1 if rollouts.correct[i] else -1 for i in rows]
        mu = np.mean(R)
        assert [found[i] for i in rows] == pytest.approx([(r - mu) * (-0.256 * mu + 1.256) for r in R], abs=1e-12)
    assert any(found)


@pytest.mark.parametrize("method", [s.TokenGroupAverage(), s.PSHW()])
def test_equal_rewards_have_no_advantage_whatever_the_rounding(batch, method):
    equal = replace(batch.rollouts, reward=torch.full_like(batch.rollouts.reward, 0.1).float())
    assert not method.advantages(equal).any()


def test_entropy_advantage(batch):
    places, a = tokens(batch)
    found = s.EntropyAdvantage(0.4, 2.0).shape(batch).numpy()
    limited = set()
    for p in places:
        A, H = a["A"][p], a["H"][p]
        assert found[p] == pytest.approx(A + min(0.4 * H, abs(A) / 2), rel=1e-12)
        assert found[p] * A >= 0
        limited.add(abs(A) / 2 < 0.4 * H)
    assert limited == {True, False}
    _, slopes = cotangents(Methods(advantage_shaping=[s.EntropyAdvantage()]), batch)
    assert "entropy" not in slopes


def test_nothing_at_all_is_no_nan(batch):
    """Without any token, and with groups of one, all is zero."""
    none = torch.zeros_like(batch.mask)
    empty = replace(batch.rollouts, mask=none, group=torch.arange(len(batch.rollouts)))
    zeros = HeadStats(**{name: torch.zeros_like(batch.logprob) for name in vars(batch.current) if name != "argmax"})
    for clip, advantage in ((s.CEGPPO(), s.TokenGroupAverage()), (s.AdaptiveClip(), s.PSHW())):
        methods = Methods(
            shaping=[s.ARESReward()], clip=clip, advantage=advantage, advantage_shaping=[s.EntropyAdvantage()],
            masks=[s.MasteredTokens()], weights=[s.STEER(exact=True), s.AdvantageRedistribution()],
            penalties=[s.BucketKL()], regularisers=[s.SIREN(), s.TER(), s.TEA()], aggregation=s.TokenMean(),
        )  # fmt: skip
        rollouts = replace(empty, stats=zeros, reference=torch.zeros_like(batch.logprob))
        rollouts = replace(rollouts, reward=methods.shaping[0].shape(rollouts))
        update = UpdateBatch(rollouts, methods.advantages(rollouts), zeros)
        found, slopes = cotangents(methods, update)
        assert float(found.loss) == 0
        assert all(not slope.any() for slope in slopes.values())
        for _, component in methods.named():
            component.after_step(update)
            assert "nan" not in str(component.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: s.SIREN(top_p=1.0), "`top_p`"),
        (lambda: s.TER(target=-1.0), "`target`"),
        (lambda: s.TEA(scale=0.0), "`scale`"),
        (lambda: s.STEER(0.0), "`least` is 0.0"),
        (lambda: s.STEER(exact=True, released=True), "choose one"),
        (lambda: s.AdvantageRedistribution(2.0), "`strength`"),
        (lambda: s.AdvantageRedistribution(low=0.0), "`low`"),
        (lambda: s.MasteredTokens(1.0), "`threshold`"),
        (lambda: s.MasteredTokens(target=-1.0), "`target`"),
        (lambda: s.MasteredTokens(gate="token"), "choose 'response'"),
        (lambda: s.CEGPPO(low_share=-1.0), "`low_share`"),
        (lambda: s.CEGPPO(dual=1.0), "`dual`"),
        (lambda: s.AdaptiveClip(low=0.6), "no ratio is below 0"),
        (lambda: s.AdaptiveClip(quantile=0.0), "`quantile`"),
        (lambda: s.TokenGroupAverage(0.0), "`bound`"),
        (lambda: s.PSHW(low=1.0), "below `high`"),
        (lambda: s.EntropyAdvantage(kappa=1.0), "`kappa`"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("slots", "one_update", "said"),
    [
        ({"clip": s.CEGPPO()}, True, ["all ratios are 1"]),
        ({"clip": s.AdaptiveClip()}, True, ["all ratios are 1"]),
        ({"clip": s.AdaptiveClip()}, False, []),
        ({"clip": s.AdaptiveClip(), "data": s.RecentSampleRecovery(4)}, True, []),
        ({"clip": s.Unclipped(), "penalties": [s.KLCov()], "data": s.RecentSampleRecovery(4)}, True, []),
        (
            {"clip": s.Unclipped(), "penalties": [s.KLCov()], "masks": [s.ClipCov()]},
            False,
            ["ClipCov, KLCov hold back"],
        ),
        ({"weights": [s.STEER()], "masks": [s.ClipCov()]}, False, ["ClipCov, STEER hold back"]),
        ({"penalties": [s.ReferenceKL(), s.BucketKL()]}, False, ["coefficients add up"]),
        ({"shaping": [s.PEAR([5])], "regularisers": [s.TER()]}, False, ["which TER is there to keep up"]),
        ({"shaping": [s.PEAR([5])], "advantage_shaping": [s.EntropyAdvantage()]}, False, ["which EntropyAdvantage"]),
        ({"shaping": [s.PEAR([5])]}, False, []),
        ({"clip": s.GSPO(), "masks": [s.MasteredTokens()]}, False, ["leaves no token out"]),
        ({"advantage": s.PSHW()}, False, ["SequenceSum"]),
        ({"advantage": s.PSHW(), "aggregation": s.SequenceSum()}, False, []),
        ({"masks": [s.ForkingTokens(0.2, renormalise=False)]}, False, ["about 0.2 times"]),
    ],
)
def test_guard(slots, one_update, said):
    sentences = explain(Methods(**slots), s.Sampler(), one_update)
    assert len(sentences) == len(said)
    assert all(words in sentence for words, sentence in zip(said, sentences, strict=True))
