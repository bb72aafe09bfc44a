"""Samplers, rewards and data selection by entropy, against transcriptions in plain Python and float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import rlvr_problems as problems
import torch

from litropy.losses import HeadStats
from litropy.recipes import steering as s
from litropy.recipes.rlvr_sampling import HuggingFaceEngine, RolloutRequest
from litropy.recipes.steering.batch import UpdateBatch
from litropy.recipes.steering.mirostat import zipf_cutoff


@pytest.fixture(scope="module")
def rollouts():
    return problems.rollouts(6, 4, dtype=torch.float64)


def logits(rows=5, vocabulary=40, scale=2.0):
    generator = torch.Generator().manual_seed(2)
    return scale * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)


def kept(truncated):
    return [set(np.flatnonzero(row)) for row in np.isfinite(truncated.numpy())]


def entropy(p):
    return -sum(x * math.log(x) for x in p if x > 0)


@pytest.mark.parametrize("released", [False, True])
def test_top_h(released):
    rows = logits()
    found = kept(s.TopH(0.4, released=released).truncate(rows))
    sizes = []
    for row, ours in zip(rows.softmax(-1).tolist(), found, strict=True):
        order, chosen = sorted(range(len(row)), key=lambda v: -row[v]), []
        for v in order:
            trial = [row[u] for u in [*chosen, v]]
            size = entropy(trial) if released else entropy([x / sum(trial) for x in trial])
            if size > 0.4 * entropy(row):
                break
            chosen.append(v)
        assert ours == set(chosen or order[:1])
        sizes.append(len(ours))
    assert max(sizes) > 2


def test_top_h_of_degenerate_rows():
    one = torch.full((1, 6), -torch.inf).index_fill(1, torch.tensor([3]), 0.0)
    assert kept(s.TopH(0.4).truncate(one)) == [{3}]
    assert kept(s.TopH(1.0).truncate(logits(1))) == [set(range(40))]


def zipf(row, mu, vocabulary):
    """k of Mirostat's paper, which counts in bits."""
    p = sorted(row, reverse=True)[:101]
    t = [math.log((i + 2) / (i + 1)) for i in range(len(p) - 1)]
    b = [math.log(p[i] / p[i + 1]) for i in range(len(p) - 1)]
    exponent = sum(x * y for x, y in zip(t, b, strict=True)) / sum(x * x for x in t)
    eps = exponent - 1
    return (eps * 2**mu / (1 - vocabulary**-eps)) ** (1 / exponent)


@pytest.mark.parametrize(("cutoff", "released"), [("zipf", False), ("zipf", True), ("surprise", False)])
def test_mirostat(cutoff, released):
    method = s.Mirostat(target=1.5, rate=0.5, cutoff=cutoff, released=released)
    method.begin(5, torch.device("cpu"))
    mu = [3.0] * 5
    for step in range(3):
        rows = logits(scale=2.5 + step).log_softmax(-1)
        found = kept(method.truncate(rows))
        for place, row in enumerate(rows.exp().tolist()):
            order = sorted(range(40), key=lambda v: -row[v])
            if cutoff == "zipf":
                k = round(zipf(row, mu[place] / math.log(2), 50000 if released else 40)) + released
                expected = set(order[: max(1, k)])
            else:
                expected = {v for v in order if -math.log(row[v]) <= mu[place]} or {order[0]}
            assert found[place] == expected
            token = order[step % len(expected)]
            mu[place] -= 0.5 * (-math.log(row[token]) - 1.5)
            rows[place, 0] = rows[place, token]
        method.observe(rows[:, 0])
    assert torch.allclose(method._bound, torch.tensor(mu, dtype=torch.float64))


def test_mirostat_holds_the_surprise():
    """Tokens drawn from many Zipf distributions are as surprising as asked for, which full sampling's are not."""
    rows = (-1.2 * torch.arange(1, 501).double().log() * torch.ones(64, 1)).log_softmax(-1)
    method, generator = s.Mirostat(target=2.0, rate=0.2), torch.Generator().manual_seed(0)
    method.begin(64, rows.device)
    surprises = []
    for _ in range(60):
        token = torch.multinomial(method.truncate(rows).softmax(-1), 1, generator=generator)
        method.observe(rows.gather(1, token)[:, 0])
        surprises.append(-rows.gather(1, token).mean())
    assert float(torch.stack(surprises[20:]).mean()) == pytest.approx(2.0, abs=0.05)
    assert entropy(rows[0].exp().tolist()) > 3


def test_mirostat_of_degenerate_rows():
    """Equal logits, tokens that are impossible, and an exponent of 1 give a number of tokens."""
    hard = torch.tensor([[0.0, 0, 0, 0], [0, -torch.inf, -torch.inf, -torch.inf], [0, -0.6931, -1.0986, -1.3863]])
    found = zipf_cutoff(hard, torch.full((3,), 2.0), 4)
    assert ((found >= 0) & (found <= 4)).all()


def hapo(entropies, quantile=0.8, released=False):
    """HAPO's h of each token, step by step as the paper has it."""
    logs = [math.log(max(h, 1e-8)) for h in entropies]
    pivot = sorted(logs)[round(quantile * (len(logs) - 1))]
    spread = math.sqrt(sum((x - pivot) ** 2 for x in logs) / len(logs))
    h = [(x - pivot) / spread for x in logs]
    low = min(h) if released else abs(min(h))
    return [x / max(h) if x > 0 else x / low for x in h]


@pytest.mark.parametrize("released", [False, True])
def test_adaptive_temperature(rollouts, released):
    method = s.AdaptiveTemperature(1.2, 0.1, released=released)
    rows = logits(6, scale=4.0)
    assert torch.equal(method.temperatures(rows), torch.full((6,), 1.2, dtype=torch.float64))
    batch = UpdateBatch(rollouts, rollouts.reward[:, None].expand(rollouts.mask.shape), rollouts.stats)
    method.after_step(batch)
    trained = batch.entropy[batch.mask].tolist()
    found = method.temperatures(rows)
    expected = []
    for row in (rows / 1.2).softmax(-1).tolist():
        h = entropy(row)
        logs = [math.log(max(x, 1e-8)) for x in trained]
        pivot = sorted(logs)[round(0.8 * (len(logs) - 1))]
        x = math.log(h) - pivot
        h = x / (max(logs) - pivot) if x > 0 else x / (pivot - min(logs)) * (-1 if released else 1)
        expected.append(1.2 * (1 + 0.1 * min(max(h, -1), 1)))
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    if not released:
        assert min(expected) < 1.2 < max(expected)
    again = s.AdaptiveTemperature(1.2, 0.1, released=released)
    again.load_state_dict(method.state_dict())
    assert torch.equal(again.temperatures(rows), found)


def test_log_entropies_are_measured_as_in_the_paper(rollouts):
    from litropy.recipes.steering.log_entropy import LogEntropyScale

    mask, values = rollouts.mask, rollouts.stats.entropy
    for released in (False, True):
        scale = LogEntropyScale.of(values, mask, 0.8)
        found = scale.measure(values, released)[mask].tolist()
        assert found == pytest.approx(hapo(values[mask].tolist(), released=released), abs=1e-12)
        assert max(found) == pytest.approx(1)
        assert min(found) == (0 if released else pytest.approx(-1))


def sampler(name, rollouts):
    if name == "adaptive":
        method = s.AdaptiveTemperature(1.1, 0.3)
        method.after_step(UpdateBatch(rollouts, rollouts.stats.logprob, rollouts.stats))
        return method
    return {
        "top_p": s.TopP(0.7),
        "top_h": s.TopH(0.6),
        "zipf": s.Mirostat(0.8),
        "surprise": s.Mirostat(0.8, cutoff="surprise"),
    }[name]


@pytest.mark.parametrize("name", ["top_p", "top_h", "zipf", "surprise", "adaptive"])
def test_engine_and_sampler_keep_each_response_apart(rollouts, name):
    """Responses one by one, from the model's logits in one go, have the log-probabilities and temperatures recorded."""
    policy, prompts = problems.policy(), torch.tensor([[5, 6, 7], [8, 9, 4]])
    asked = RolloutRequest(prompts, torch.ones_like(prompts), 3, 6, [1], 0, 2)
    found = HuggingFaceEngine(max_rows=4).generate(policy, asked, sampler(name, rollouts))
    alone, some = sampler(name, rollouts), set()
    for row in range(6):
        response = found.responses[row][found.mask[row]]
        with torch.no_grad():
            rows = policy.causal_lm(torch.cat([prompts[row // 3], response])[None]).logits[0, 2:-1]
        alone.begin(1, rows.device)
        for place, token in enumerate(response.tolist()):
            heat = alone.temperatures(rows[place : place + 1])
            known = (rows[place : place + 1] / heat[:, None]).log_softmax(-1)
            left = alone.truncate(known).log_softmax(-1)
            alone.observe(known[:, token])
            assert float(found.behaviour[row, place]) == pytest.approx(float(left[0, token]), abs=2e-4)
            assert float(found.temperature[row, place]) == pytest.approx(float(heat), abs=2e-4)
            some |= {float(heat)} if name == "adaptive" else {int(left.isfinite().sum())}
    assert len(some) > 2


@pytest.mark.parametrize("marker", [[5], [5, 7]])
def test_pear(rollouts, marker):
    responses = rollouts.responses.clone()
    responses[responses == 5] = 6
    for row in range(0, len(rollouts), 2):
        place = row % 5
        responses[row, place : place + len(marker)] = torch.tensor(marker)
    batch = replace(rollouts, responses=responses, stats=HeadStats(entropy=0.4 * rollouts.stats.entropy))
    found = s.PEAR(marker, score=0.9, wrong=0.05, alpha=0.5).shape(batch).tolist()
    kinds = set()
    for row in range(len(rollouts)):
        length = int(batch.lengths[row])
        tokens, h = responses[row, :length].tolist(), batch.stats.entropy[row, :length].tolist()
        ends = [k for k in range(length) if tokens[k : k + len(marker)] == marker]
        k = ends[0] if ends else length
        think, answer = h[:k], h[k + len(marker) :]
        penalty = max(0, np.mean(think or [0]) - 0.5 * np.mean(answer or [0]))
        right = bool(batch.correct[row])
        assert found[row] == pytest.approx(min(1, 0.9 - penalty) if right else 0.05, abs=1e-12)
        kinds.add((right, bool(ends), penalty > 0))
    assert len(kinds) == 7  # all but a right response of some tokens without a mark and a penalty


def buckets(rollouts):
    groups = rollouts.group.tolist()
    share = {g: np.mean([c for c, k in zip(rollouts.correct.tolist(), groups, strict=True) if k == g]) for g in groups}
    return [0 if share[g] >= 2 / 3 else 1 if share[g] >= 1 / 3 else 2 for g in groups]


def windows(rollouts, width, quantile):
    """Where windows of each response begin that are more uncertain than the mean of the quantiles."""
    rows = [rollouts.stats.entropy[i, :n].numpy() for i, n in enumerate(rollouts.lengths.tolist())]
    high = np.mean([np.quantile(row, quantile) for row in rows if len(row)])
    return [[t for t in range(len(row) - width + 1) if row[t : t + width].mean() > high] for row in rows]


def with_difficulties(rollouts):
    """All buckets, with wrong responses in each."""
    correct = torch.tensor([1, 1, 1, 0, 1, 0, 1, 0, 1, 0, 0, 0] * 2).bool()
    return replace(rollouts, correct=correct, reward=correct.double())


def test_ares_reward(rollouts):
    first = with_difficulties(rollouts)
    second = replace(first, stats=HeadStats(entropy=first.stats.entropy.roll(5, 0) * first.mask))
    method = s.ARESReward(width=2, quantile=0.5, decay=0.5, eps=0.5)
    assert torch.equal(method.shape(first), first.reward)  # no target before it
    target = None
    changed = set()
    for step, batch in enumerate((first, second, second)):
        bucket, number = np.array(buckets(batch)), np.array([len(w) for w in windows(batch, 2, 0.5)])
        mean = [number[bucket == d].mean() for d in range(3)]
        if step:
            if step == 2:  # a resumed run goes on alike
                state, method = method.state_dict(), s.ARESReward(width=2, quantile=0.5, decay=0.5, eps=0.5)
                method.load_state_dict(state)
            found = method.shape(batch)
            for i, d in enumerate(bucket):
                delta = number[i] - target[d]
                g = (max(0, delta), abs(delta), max(0, -delta))[d]
                price = max(0, (mean[d] - target[d]) / (number[bucket == d].var() + 0.5))
                loss = 0 if batch.correct[i] else price * g
                assert float(found[i]) == pytest.approx(float(batch.reward[i]) - loss, abs=1e-12)
                changed |= {d} if loss else set()
        target = mean if target is None else [0.5 * t + 0.5 * m for t, m in zip(target, mean, strict=True)]
    assert changed


def test_ares_reward_as_released(rollouts):
    """The published code, written down for one response after the other."""
    triggers, width, quantile = [3, 5, 8, 9], 2, 0.6
    argmax = torch.randint(3, 12, rollouts.mask.shape, generator=torch.Generator().manual_seed(2))
    base = with_difficulties(rollouts)
    batches = [
        replace(base, stats=HeadStats(entropy=base.stats.entropy.roll(k, 0) * base.mask, argmax=argmax.roll(k, 1)))
        for k in (0, 5, 3)
    ]
    method = s.ARESReward(width, quantile, released=True, triggers=triggers)
    threshold, average, alpha, kinds = -1.0, None, [0.5, 0.5, 0.5], set()
    for step, batch in enumerate(batches):
        counts, quantiles = [], []
        for row, length in enumerate(batch.lengths.tolist()):
            h, tokens = batch.stats.entropy[row, :length].tolist(), batch.stats.argmax[row, :length].tolist()
            means = [np.mean(h[i + 1 : i + 1 + width]) if i + width < length else None for i in range(length)]
            behind = [m for token, m in zip(tokens, means, strict=True) if token in triggers and m is not None]
            counts.append(sum(m >= threshold for m in behind))
            filled = []
            for i, mean in enumerate(means):
                filled.append(mean if mean is not None else np.mean(filled) if filled else h[i])
            quantiles.append(np.quantile(filled, quantile) if filled else 0.0)
        middle = float(np.median(quantiles))
        average = threshold = middle if average is None else 0.99 * average + 0.01 * middle
        bucket, target = np.array(buckets(batch)), {}
        for d in range(3):
            mean = np.array(counts)[bucket == d].mean()
            target[d] = round(mean)
            alpha[d] = min(2, max(0, alpha[d] + 0.05 * (mean - target[d]) * (1, 1, -1)[d]))
        if step == 1:  # a resumed run goes on alike
            state, method = method.state_dict(), s.ARESReward(width, quantile, released=True, triggers=triggers)
            method.load_state_dict(state)
        found = method.shape(batch)
        for row, d in enumerate(bucket):
            delta, margin = counts[row] - target[d], max(1, (0.15, 0.25, 0.35)[d] * max(1, target[d]))
            kappa, temperature, cap = (2, 3, 4)[d], (2, 2.5, 3)[d], alpha[d] * (1, 1, 1.2)[d]
            size = (max(0, delta - margin), max(0, abs(delta) - margin), max(0, -delta - margin))[d]
            huber = size**2 / (2 * kappa) if size <= kappa else size - kappa / 2
            if not batch.correct[row]:
                gain = cap * (0.6, 0.8, 1)[d] / (1 + math.exp(-max(0, delta - margin) / temperature))
            elif d == 2 and delta >= -margin:
                gain = cap / (1 + math.exp(-(delta + margin) / temperature))
            else:
                gain = -cap * min(1, huber / (margin + kappa) * (0.5 if d == 2 else 1))
            assert float(found[row]) == pytest.approx(float(batch.reward[row]) + gain, abs=1e-12)
            kinds.add((int(d), bool(batch.correct[row]), size > 0))
    assert {kind[:2] for kind in kinds} == {(d, right) for d in range(3) for right in (False, True)}
    assert any(kind[2] for kind in kinds)


@pytest.mark.parametrize("released", [False, True])
def test_bucket_kl(rollouts, released):
    rollouts = with_difficulties(rollouts)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(rollouts.mask.shape, generator=generator, dtype=torch.float64)
    batch = UpdateBatch(rollouts, noise, HeadStats(logprob=rollouts.stats.logprob + noise * rollouts.mask))
    method = s.BucketKL(0.3, 0.2, 0.1, rate=0.5, relief=0.25, width=2, quantile=0.5, released=released)
    bucket, open_at = buckets(rollouts), windows(rollouts, 2, 0.5)
    mask, d = rollouts.mask.numpy(), (rollouts.reference - batch.logprob).numpy()
    k3 = np.exp(d) - d - 1
    per_row = [k3[i][mask[i]].mean() if mask[i].any() else 0 for i in range(len(mask))]
    beta, multiplier, targets = [0.3, 0.2, 0.1], [1.0] * 3, (0.05, 0.1, 0.2)
    for _ in range(3):
        found = method.penalties(batch).numpy()
        for i, t in zip(*np.nonzero(mask), strict=True):
            size = beta[bucket[i]] * (1 if released else multiplier[bucket[i]])
            rho = 0.25 if t in open_at[i] and not released else 1
            assert found[i, t] == pytest.approx(size * rho * k3[i, t], rel=1e-9)
        method.after_step(batch)
        for b in range(3):
            distance = np.mean([per_row[i] for i in range(len(mask)) if bucket[i] == b])
            multiplier[b] = max(0, multiplier[b] + 0.5 * (distance - targets[b]))
            beta[b] *= multiplier[b] if released else 1
    logprob = batch.logprob.clone().requires_grad_()
    slope = torch.autograd.grad(method.penalties(replace(batch, current=HeadStats(logprob=logprob))).sum(), logprob)[0]
    factor = method.penalties(batch) / torch.where(rollouts.mask, torch.from_numpy(k3), 1)
    assert torch.allclose(slope[rollouts.mask], (factor * (1 - torch.from_numpy(np.exp(d))))[rollouts.mask])


def test_recovered_samples_are_used_once_and_first():
    rollouts = problems.rollouts(4, 4)
    solved = rollouts.group_mean(rollouts.correct.float())
    useful = sorted(set(rollouts.group[(solved > 0) & (solved < 1)].tolist()))
    assert len(useful) >= 2
    method = s.RecentSampleRecovery(groups=1)
    assert method.stale
    chosen = method.select(rollouts)
    assert set(chosen.group.tolist()) == {useful[0]}
    again = s.RecentSampleRecovery(groups=1)
    again.load_state_dict(method.state_dict())
    later = replace(rollouts, group=rollouts.group + 100, row=rollouts.row + 1000)
    for waiting in (method, again):
        second = waiting.select(later)
        assert set(second.group.tolist()) == {useful[1]}
        assert second.group.shape == (4,)
        assert int(waiting.state_dict()["kept"]["group"].min()) == (useful[2] if len(useful) > 2 else 100 + useful[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: s.TopH(0.0), "`share` is 0.0"),
        (lambda: s.Mirostat(0.0), "`target`"),
        (lambda: s.Mirostat(cutoff="zip"), "choose 'zipf'"),
        (lambda: s.AdaptiveTemperature(strength=1.0), "`strength`"),
        (lambda: s.PEAR([]), "`marker` is empty"),
        (lambda: s.PEAR([5], score=2.0), "`score`"),
        (lambda: s.ARESReward(width=0), "`width`"),
        (lambda: s.ARESReward(decay=1.0), "`decay`"),
        (lambda: s.ARESReward(released=True), "`triggers` is None"),
        (lambda: s.ARESReward(triggers=[5]), "`released` is False"),
        (lambda: s.BucketKL(relief=2.0), "`relief`"),
        (lambda: s.BucketKL(quantile=1.0), "`quantile`"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
