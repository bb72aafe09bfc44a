"""Skipping: what the backward pass leaves out is bounded, stated, and never the wrong thing."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_head_problems import (
    BUDGET,
    IMPLS,
    differentiable,
    exact_logits,
    gradients,
    make_problem,
    solve,
    solve_stored,
)

from litropy.kernels.linear_head_skipping import select_tiles, tile_of
from litropy.kernels.linear_head_types import RowStats, Want
from litropy.testing import assert_within_budget

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def vocabulary(impl, dtype=torch.float32):
    """Five tiles and a narrow one."""
    return 5 * tile_of(impl, dtype)[1] + 61


def confident(impl="torch", N=24, D=24, dtype=torch.float32, device="cpu", share=1.0, **options):
    """Rows whose mass is nearly all on one entry, each of the first two tiles; the last ones spread theirs."""
    V = vocabulary(impl, dtype)
    problem = make_problem(N, D, V, dtype, device, bias=True, scale=0.3, **options)
    target = torch.where(problem.target < 0, -1, torch.randperm(V // 3, device=device)[:N])
    sure = torch.arange(N, device=device) < share * N
    direction = torch.nn.functional.one_hot(torch.arange(N, device=device) % D, D).to(dtype)
    weight = problem.weight.clone()
    weight[target.clamp_min(0)] += (24 * direction * sure[:, None]).to(dtype)
    return problem.but(weight=weight, input=problem.input * 0.3 + direction, target=target)


def of_entries(kept, problem, impl):
    """Which entries each row keeps, [N, V]."""
    height, width = tile_of(impl, problem.dtype)
    return kept.repeat_interleave(height, 0)[: len(problem.input)].repeat_interleave(width, 1)[:, : len(problem.weight)]


WANTS = {"loss": Want(), "entropy": Want(entropy=True), "varentropy": Want(varentropy=True)}
CASES = [("loss", 0.05, torch.bfloat16), ("loss", 0.05, torch.float16)]
CASES += [(name, tolerance, torch.float32) for name in WANTS for tolerance in (1e-4, 0.05, 0.9)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "tolerance", "dtype"), CASES)
def test_no_row_loses_more_than_it_may(name, tolerance, dtype, impl, device):
    problem = confident(impl, dtype=dtype, device=device)
    stats, kept, _ = solve(problem, impl, WANTS[name], skip_tol=tolerance)
    valid = problem.target >= 0
    entries = of_entries(kept, problem, impl)
    lost = (exact_logits(problem).softmax(1) * ~entries).sum(1)[valid]
    rounding = 8 * torch.finfo(dtype).eps * tolerance + 1e-7
    assert (lost <= tolerance + rounding).all()
    assert (stats.skipped_mass <= tolerance).all()
    # the masses are those of logits rounded to the dtype, and so are off by the rounding of a logit
    slack = 40 * torch.finfo(dtype).eps * tolerance + 1e-7
    torch.testing.assert_close(stats.skipped_mass[valid].double(), lost, rtol=0, atol=slack)
    if tolerance > 1e-3:
        assert (stats.surviving_share[valid] < 1).all()
    height, width = tile_of(impl, dtype)
    of_rows = kept.repeat_interleave(height, 0)[:24]
    torch.testing.assert_close(stats.surviving_share[valid], of_rows[valid].float().mean(1))
    if height == 1:  # larger tiles may lose their targets, which are then added by themselves
        assert of_rows.gather(1, problem.target.clamp_min(0)[:, None] // width)[valid[:, None]].all()
    for statistic in (stats.skipped_mass, stats.surviving_share):
        assert not statistic[~valid].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_more_tolerance_skips_more(impl, device):
    problem = confident(impl, device=device)
    kept = [solve(problem, impl, Want(), skip_tol=tolerance)[1] for tolerance in (1e-6, 1e-3, 0.1, 0.9)]
    for less, more in pairwise(kept):
        assert not (more & ~less).any()
    shares = [x.float().mean() for x in kept]
    assert shares[0] > shares[-1]


PROBLEMS = {
    "plain": {},
    "low rank": {"rank": 3},
    "temperature": {"temperature": 1.5},
    "temperatures": {"temperature": "per row"},
    "class weights": {"mean_weight": "random"},
}


def lost_gradients(problem, want, g, tolerance, impl, budget=BUDGET):
    """What skipping takes from each gradient, in the problem's dtype and, exactly, in float64."""
    stats, kept, leaves = solve(problem, impl, want, budget, tolerance)
    exact, _, exact_leaves = solve(problem, impl, want, budget)
    a, b = gradients(stats, leaves, g), gradients(exact, exact_leaves, g)
    return stats, kept, {name: (a[name] - b[name]).double() for name in a}


@pytest.mark.parametrize("budget", [1 << 15, BUDGET])
@pytest.mark.parametrize("options", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("name", ["logprob", "lse", "mean_logprob", "entropy", "varentropy"])
def test_the_error_is_what_the_skipped_entries_would_have_added(name, options, budget):
    """To the last bit of float64: the gradient over the kept entries, plus all of what needs no probabilities."""
    torch.manual_seed(3)
    tolerance = 0.02
    options = dict(options)
    if options.get("temperature") == "per row":
        options["temperature"] = 0.8 + torch.rand(24, dtype=torch.float64)
    if options.get("mean_weight") == "random":
        V = vocabulary("torch")
        options["mean_weight"] = torch.rand(V, dtype=torch.float64) / V
    problem = confident(dtype=torch.float64, share=2 / 3, **options)
    want = Want(**{name: True}) if name in Want._fields else Want()
    g = {name: torch.randn(24, dtype=torch.float64)}
    _, kept, lost = lost_gradients(problem, want, g, tolerance, "torch", budget)
    skipped = ~of_entries(kept, problem, "torch") & (problem.target >= 0)[:, None]
    assert skipped.any(1).sum() > 5
    dz = through_probabilities(problem, name, g[name]) * skipped
    inverse = 1 / problem.options.get("temperature", 1.0)
    dz = dz * (inverse[:, None] if isinstance(inverse, torch.Tensor) else inverse)
    expected = {"input": -dz @ problem.weight, "weight": -dz.t() @ problem.input, "bias": -dz.sum(0)}
    if problem.u is not None:
        expected |= {"u": -dz @ problem.low_rank, "low_rank": -dz.t() @ problem.u}
    for leaf, difference in lost.items():
        torch.testing.assert_close(difference, expected[leaf], rtol=1e-6, atol=1e-12, msg=leaf)


def through_probabilities(problem, name, g):
    """The part of d statistic / d logit that goes through the probabilities, times g, [N, V]."""
    stats, _ = solve_stored(problem.but(target=None))
    p = exact_logits(problem).softmax(1)
    x = p.clamp_min(1e-300).log() + stats["entropy"].detach()[:, None]
    total = problem.options["mean_weight"].sum() if "mean_weight" in problem.options else 1.0
    factor = {
        "lse": 1.0,
        "logprob": -1.0,
        "mean_logprob": -total,
        "entropy": -x,
        "varentropy": x * (x + 2) - stats["varentropy"].detach()[:, None],
    }[name]
    return p * factor * g[:, None]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["logprob", "lse", "mean_logprob", "entropy", "varentropy"])
def test_the_error_of_every_row_has_its_bound(name, impl, device):
    """||error of dInput_n|| <= |g_n| skip_tol max ||w_v||, the entropy's included: its cost counts log p."""
    problem, tolerance = confident(impl, device=device), 0.02
    want = Want(**{name: True}) if name in Want._fields else Want()
    g = torch.randn(24, device=device)
    stats, kept, lost = lost_gradients(problem, want, {name: g}, tolerance, impl)
    assert not kept.all()
    longest = problem.weight.norm(dim=1).max().double()
    is_entropy = name in ("entropy", "varentropy")
    mass = torch.full_like(g, tolerance).double() if is_entropy else stats.skipped_mass.double()
    rounding = 1e-5 * longest
    assert (lost["input"].norm(dim=1) <= g.abs().double() * mass * longest + rounding).all()
    if is_entropy:
        return
    skipped_p = exact_logits(problem).softmax(1) * ~of_entries(kept, problem, impl)
    bound = (g.abs().double()[:, None] * skipped_p * problem.input.double().norm(dim=1)[:, None]).sum(0)
    assert (lost["weight"].norm(dim=1) <= bound + 1e-5).all()
    assert (lost["bias"].abs() <= (g.abs().double()[:, None] * skipped_p).sum(0) + 1e-5).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_that_is_sure_keeps_its_z_loss(impl, device):
    """p_y near 1 makes p - 1 nearly nothing but not the gradient of lse, which is p at the target."""
    problem = confident(impl, device=device, ignored=False)
    problem = problem.but(weight=2 * problem.weight)
    stats, kept, leaves = solve(problem, impl, Want(), skip_tol=1e-3)
    assert kept.float().mean() < 0.5
    assert (stats.logprob > -1e-3).all()
    g = {"logprob": -torch.ones(24, device=device), "lse": 2e-4 * stats.lse.detach()}
    got = gradients(stats, leaves, g)
    truth = gradients(*solve_stored(problem), g)
    for name in got:
        error = (got[name].double() - truth[name]).norm()
        assert error <= 0.02 * truth[name].norm(), name
    assert truth["input"].norm() > 1e-3


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocabulary", [4097, 6144])
def test_a_fresh_head_keeps_its_gradient(vocabulary, impl, device):
    """Near-uniform rows: every p is below any threshold on single entries, and all of them together are everything."""
    problem = make_problem(16, 8, vocabulary, device=device, bias=False, scale=0.02, ignored=False)
    stats, _, leaves = solve(problem, impl, Want(), skip_tol=1e-3)
    g = {"logprob": torch.full((16,), -1 / 16, device=device)}
    got, truth = gradients(stats, leaves, g), gradients(*solve_stored(problem), g)
    absent = torch.ones(vocabulary, dtype=torch.bool, device=device).index_fill(0, problem.target, False)
    error = (got["weight"].double() - truth["weight"])[absent].norm(dim=1)
    assert (error <= 0.01 * truth["weight"][absent].norm(dim=1) + 1e-12).all()
    assert truth["weight"][absent].norm(dim=1).min() > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_keeping_everything_is_exact(impl, device):
    """So small a tolerance that no tile is light enough gives the gradients of none."""
    problem = make_problem(20, 16, vocabulary(impl), device=device)
    stats, kept, leaves = solve(problem, impl, Want(), skip_tol=1e-9)
    assert of_entries(kept, problem, impl)[problem.target >= 0].all()
    exact, _, exact_leaves = solve(problem, impl, Want())
    g = {"logprob": torch.randn(20, device=device), "lse": torch.randn(20, device=device)}
    truth = gradients(*solve_stored(problem), g)
    a, b = gradients(stats, leaves, g), gradients(exact, exact_leaves, g)
    for name in a:
        assert_within_budget(name, a[name], b[name], truth[name])
    for name in ("logprob", "lse", "max_logprob"):
        torch.testing.assert_close(getattr(stats, name), getattr(exact, name), rtol=1e-6, atol=1e-6)
    assert not stats.skipped_mass.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_with_a_softcap_smoothing_keeps_everything(impl, device):
    """What smoothing adds to a skipped tile could not be had without its logits."""
    problem = confident(impl, device=device, softcap=20.0)
    smoothed, kept, leaves = solve(problem, impl, Want(mean_logprob=True), skip_tol=0.05)
    assert of_entries(kept, problem, impl)[problem.target >= 0].all()
    assert not smoothed.skipped_mass.any()
    g = {"mean_logprob": torch.randn(24, device=device)}
    exact, _, exact_leaves = solve(problem, impl, Want(mean_logprob=True))
    truth = gradients(*solve_stored(problem), g)
    a, b = gradients(smoothed, leaves, g), gradients(exact, exact_leaves, g)
    for name in a:
        assert_within_budget(name, a[name], b[name], truth[name])
    assert not solve(problem, impl, Want(), skip_tol=0.05)[1].all()


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_tiles_are_skipped_for_free(impl, device):
    """Tiles whose every logit is -inf have no mass; with any tolerance they go, and nothing becomes NaN."""
    width = tile_of(impl, torch.float32)[1]
    problem = make_problem(9, 8, vocabulary(impl), device=device, ignored=False)
    bias = problem.bias.index_fill(0, torch.arange(width, 4 * width, device=device), -math.inf)
    problem = problem.but(bias=bias, target=problem.target % width)
    stats, kept, leaves = solve(problem, impl, Want(entropy=True), skip_tol=1e-9)
    assert not of_entries(kept, problem, impl)[:, width : 4 * width].any()
    assert not stats.skipped_mass.any()
    g = {"logprob": torch.randn(9, device=device), "entropy": torch.randn(9, device=device)}
    exact, _, exact_leaves = solve(problem, impl, Want(entropy=True))
    for a, b in zip(gradients(stats, leaves, g).values(), gradients(exact, exact_leaves, g).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_that_is_not_finite_keeps_everything(impl, device):
    """And shows its NaN in the gradient instead of hiding it in what was skipped."""
    problem = confident(impl, device=device, ignored=False)
    input = problem.input.clone()
    input[2, 3] = math.nan
    stats, kept, leaves = solve(problem.but(input=input), impl, Want(), skip_tol=0.1)
    assert of_entries(kept, problem, impl)[2].all()
    got = gradients(stats, leaves, {"logprob": torch.ones(24, device=device)})
    assert got["input"][2].isnan().any()
    assert got["weight"].isnan().any(1).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("N", [0, 4])
def test_nothing_to_skip(N, impl, device):
    V = vocabulary(impl)
    problem = make_problem(N, 8, V, device=device)
    problem = problem.but(target=torch.full((N,), -1, device=device))
    stats, kept, leaves = solve(problem, impl, Want(mean_logprob=True), skip_tol=0.1)
    height, width = tile_of(impl, torch.float32)
    assert kept.shape == (-(-N // height), -(-V // width))
    ones = {name: torch.ones(N, device=device) for name in differentiable(Want(mean_logprob=True))}
    for gradient in gradients(stats, leaves, ones).values():
        assert torch.equal(gradient, torch.zeros_like(gradient))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    T=st.integers(1, 9),
    tolerance=st.floats(1e-6, 0.99),
    spread_of_masses=st.floats(0.1, 20),
    cost=st.sampled_from((Want(), Want(entropy=True), Want(varentropy=True))),
    seed=st.integers(0, 1000),
)
def test_selection_is_greedy_and_bounded(T, tolerance, spread_of_masses, cost, seed):
    """The lightest tiles go first, the target's and ordinary ones never, and one more would be too much."""
    generator = torch.Generator().manual_seed(seed)
    log_mass = spread_of_masses * torch.randn(12, T, generator=generator, dtype=torch.float64)
    target = torch.randint(T * 512, (12,), generator=generator)
    lse = log_mass.logsumexp(1)
    zeros = torch.zeros(12, dtype=torch.float64)
    stats = RowStats(lse=lse, entropy=zeros + 3, skipped_mass=zeros.clone(), surviving_share=zeros.clone())
    kept = select_tiles(log_mass, (1, 512), T * 512, stats, target, cost, tolerance, BUDGET, None)
    share = (log_mass - lse[:, None]).exp()
    assert ((share * ~kept).sum(1) <= tolerance).all()
    assert kept.gather(1, target[:, None] // 512).all()
    is_ordinary = share >= 0.5 / T  # half of what each would hold if all entries were equally likely
    assert (kept | ~is_ordinary).all()
    candidates = (torch.arange(T) != target[:, None] // 512) & ~is_ordinary
    for n in range(12):
        gone, stay = share[n][~kept[n]], share[n][kept[n] & candidates[n]]
        if len(gone) and len(stay):
            assert gone.max() <= stay.min()
        if len(stay) and cost == Want():
            assert gone.sum() + stay.min() > tolerance
