"""The linear head's statistics and gradients against stored float64 logits: every option, odd shapes, wild inputs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_head_problems import (
    BUDGET,
    DTYPES,
    IMPLS,
    SHAPES,
    STREAMED,
    check,
    differentiable,
    gradients,
    head_of,
    make_problem,
    solve,
    solve_stored,
    values,
)

from litropy.kernels.linear_head import Plan, linear_head_rows
from litropy.kernels.linear_head_reference import linear_head_reference
from litropy.kernels.linear_head_types import Head, Want
from litropy.testing import assert_within_budget

pytestmark = pytest.mark.usefixtures("poisoned_empty")
EXACT = (torch.float32, torch.float64)


def check_argmax(problem, ours, truth):
    """Where rounded logits tie, the argmax may differ from the exact one: its logit is the greatest up to rounding."""
    exact = problem.but(target=ours.argmax), problem.but(target=truth["argmax"])
    chosen, best = (solve_stored(x)[0]["logprob"] for x in exact)
    gap = (best - chosen) if problem.target is None else (best - chosen)[problem.target >= 0]
    assert (gap <= 4 * torch.finfo(problem.dtype).eps * (1 + truth["lse"].abs().max())).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_and_gradients(shape, dtype, impl, device):
    problem = make_problem(*shape, dtype, device)
    check_argmax(problem, *check(problem, impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{"softcap": 2.0}, {"temperature": 0.7}, {}], ids=["softcap", "temperature", "both"]
)
def test_softcap_and_temperature(options, dtype, impl, device):
    options = options or {"softcap": 5.0, "temperature": 0.5 + torch.rand(40, device=device)}
    problem = make_problem(40, 30, 200, dtype, device, scale=2.0, **options)
    check_argmax(problem, *check(problem, impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_addition(dtype, impl, device):
    check(make_problem(40, 30, 200, dtype, device, rank=5), impl, budget=1 << 14)


@pytest.mark.parametrize("impl", IMPLS)
def test_everything_at_once(impl, device):
    weights = torch.rand(301, device=device) / 301 * (torch.arange(301, device=device) % 4 > 0)
    temperature = 0.5 + torch.rand(67, device=device)
    problem = make_problem(
        67, 33, 301, device=device, rank=3, softcap=4.0, temperature=temperature, mean_weight=weights
    )
    check(problem, impl, budget=1 << 15)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", differentiable(STREAMED))
def test_each_gradient_alone(name, impl, device):
    """So that no large gradient hides the error of a small one."""
    check(make_problem(40, 30, 200, device=device), impl, only=[name])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("field", [name for name, value in STREAMED._asdict().items() if value is True])
def test_each_statistic_alone(field, impl, device):
    """Asked for by itself, a statistic is the same, and what nobody asked for is empty."""
    problem, want = make_problem(20, 16, 90, device=device), Want(**{field: True})
    alone, everything = solve(problem, impl, want)[0], solve(problem, impl)[0]
    torch.testing.assert_close(getattr(alone, field), getattr(everything, field), rtol=1e-6, atol=1e-6)
    others = {name for name in STREAMED._fields[:6] if name not in (field, "entropy")}
    assert all(not getattr(alone, name).numel() for name in others)
    check(problem, impl, want)


@pytest.mark.parametrize("impl", ["torch"])
def test_varentropy_over_many_tiles(impl, device):
    """A difference of moments about the maximum would lose digits; central moments do not."""
    problem, want = make_problem(16, 32, 20_000, device=device), Want(varentropy=True)
    ours, twin, truth = solve(problem, impl, want, 1 << 14)[0], *(solve_stored(problem, want, x)[0] for x in EXACT)
    assert_within_budget("varentropy", ours.varentropy, twin["varentropy"].detach(), truth["varentropy"].detach())


@pytest.mark.parametrize("impl", IMPLS)
def test_without_bias_and_target(impl, device):
    problem = make_problem(20, 16, 90, device=device, bias=False)
    check(problem, impl)
    assert not solve(problem.but(target=None), impl)[0].logprob.numel()
    check(problem.but(target=None), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offset", [80.0, -200.0, 1000.0])
def test_large_offsets_keep_their_digits(offset, impl, device):
    """A bias that all logits share changes nothing but the log-sum-exp; raw sums of z exp z lose all digits."""
    problem = make_problem(16, 8, 500, device=device, ignored=False, bias=False)
    plain, shifted = (solve(problem.but(bias=torch.full((500,), b, device=device)), impl)[0] for b in (0.0, offset))
    slack = 4 * torch.finfo(torch.float32).eps * abs(offset)
    for name in values(STREAMED):
        expected = getattr(plain, name) + (offset if name == "lse" else 0)
        power = 8 if name == "varentropy" else 1  # grows with the square of a log-probability
        torch.testing.assert_close(getattr(shifted, name), expected, rtol=0, atol=power * slack)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [-1000.0, 4000.0])
def test_large_offsets_stay_within_budget(offset, dtype, impl, device):
    problem = make_problem(24, 16, 150, dtype, device)
    check(problem.but(bias=problem.bias + offset), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(dtype, impl, device):
    """Nearly one-hot rows and logits in the thousands: finite, and within the budget."""
    check(make_problem(24, 16, 150, dtype, device, scale=300.0), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [1e10, 1e18])
def test_absurd_logits(scale, impl, device):
    """As large as their squares still fit: one-hot rows whose entropies are 0, not NaN."""
    problem = make_problem(8, 4, 70, device=device, bias=False, ignored=False, scale=scale)
    stats, _, leaves = solve(problem, impl, budget=1 << 10)
    for name in ("entropy", "varentropy", "entropy_drift"):
        assert torch.equal(getattr(stats, name), torch.zeros(8, device=device)), name
    assert torch.equal(stats.collision, torch.ones(8, device=device))
    got = gradients(stats, leaves, {"entropy": torch.ones(8), "varentropy": torch.ones(8)})
    assert all(torch.equal(g, torch.zeros_like(g)) for g in got.values())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("budget", [1 << 12, BUDGET])
def test_masked_vocabulary(budget, impl, device):
    """A bias of -inf takes entries out of the vocabulary, whole tiles included; the rest is unharmed."""
    problem = make_problem(9, 8, 300, device=device, ignored=False)
    target, inside = problem.target % 20 + 140, slice(140, 160)
    bias = torch.full((300,), -math.inf, device=device)
    bias[inside] = 0
    want = STREAMED._replace(mean_logprob=False)
    masked, _, leaves = solve(problem.but(bias=bias, target=target), impl, want, budget)
    small_problem = problem.but(weight=problem.weight[inside], bias=bias[inside], target=target - 140)
    small, _, small_leaves = solve(small_problem, impl, want)
    for name in values(want):
        torch.testing.assert_close(getattr(masked, name), getattr(small, name))
    assert torch.equal(masked.argmax, small.argmax + 140)
    cotangents = {name: torch.randn(9, device=device) for name in differentiable(want)}
    got, expected = gradients(masked, leaves, cotangents), gradients(small, small_leaves, cotangents)
    torch.testing.assert_close(got["input"], expected["input"], rtol=1e-5, atol=1e-5)
    for name in ("weight", "bias"):
        torch.testing.assert_close(got[name][inside], expected[name], rtol=1e-5, atol=1e-5)
        assert not got[name][:140].any()
        assert not got[name][160:].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_mean_over_a_masked_vocabulary(impl, device):
    """Entries of weight 0 do not count, even at -inf; with a weight they make the mean -inf, as the formula says."""
    problem = make_problem(9, 8, 300, device=device, ignored=False)
    bias = problem.bias.index_fill(0, torch.arange(30, 290, device=device), -math.inf)
    weights = (bias > -math.inf) / 300
    check(problem.but(bias=bias, target=problem.target % 30, mean_weight=weights), impl, budget=1 << 12)
    stats = solve(problem.but(bias=bias), impl, budget=1 << 12)[0]
    assert torch.equal(stats.mean_logprob, torch.full_like(stats.mean_logprob, -math.inf))
    assert torch.equal(stats.logprob.isfinite(), bias[problem.target].isfinite())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_propagate(bad, impl, device):
    """To their own row and to no other, in the statistics and in the gradient of the hidden states."""
    problem = make_problem(6, 8, 40, device=device, ignored=False)
    input = problem.input.clone()
    input[2, 3] = bad
    stats, _, leaves = solve(problem.but(input=input), impl)
    broken = torch.arange(6, device=device) == 2
    for name in ("logprob", "entropy", "varentropy", "collision", "entropy_drift", "mean_logprob"):
        assert torch.equal(~getattr(stats, name).isfinite(), broken), name
    got = gradients(stats, leaves, {"logprob": torch.ones(6, device=device)})
    assert torch.equal(~got["input"].isfinite().all(1), broken)


def test_nan_in_an_ignored_row_stays_there():
    """On a CPU, where ignored rows are left out of everything, padding may hold anything."""
    problem = make_problem(6, 8, 40)
    input = problem.input.masked_fill((problem.target < 0)[:, None], math.nan)
    stats, _, leaves = solve(problem.but(input=input), "torch")
    clean, _, clean_leaves = solve(problem, "torch")
    for name in ("logprob", "lse", "entropy"):
        assert torch.equal(getattr(stats, name), getattr(clean, name))
    g = {"logprob": torch.ones(6), "entropy": torch.ones(6)}
    for a, b in zip(gradients(stats, leaves, g).values(), gradients(clean, clean_leaves, g).values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_non_contiguous_inputs_and_cotangents(impl, device):
    problem = make_problem(24, 20, 60, device=device, rank=2)
    transposed = {name: getattr(problem, name).t().contiguous().t() for name in ("input", "weight", "u", "low_rank")}
    strided = problem.but(**transposed, bias=problem.bias[:, None].expand(-1, 2)[:, 0])
    check(strided, impl)
    stats, _, leaves = solve(strided, impl)
    for name in differentiable(STREAMED):
        value = getattr(stats, name)
        one = torch.ones((), device=device).expand(24)
        got, expected = (
            torch.autograd.grad(value, leaves["input"], g, retain_graph=True)[0] for g in (one, one.clone())
        )
        assert torch.equal(got, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("N", [0, 4])
def test_nothing_to_do(N, impl, device):
    """No rows, or none that counts: zeros, connected to the graph."""
    problem = make_problem(N, 8, 30, device=device)
    problem = problem.but(target=torch.full((N,), -1, device=device))
    stats, _, leaves = solve(problem, impl)
    for name in (*values(STREAMED), "argmax"):
        assert torch.equal(getattr(stats, name), torch.zeros_like(getattr(stats, name)))
    ones = {name: torch.ones(N, device=device) for name in differentiable(STREAMED)}
    for name, gradient in gradients(stats, leaves, ones).items():
        assert torch.equal(gradient, torch.zeros_like(leaves[name]))


# the eager twin's worst error is a fair yardstick only over enough numbers: no single rows and no tiny widths here
@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    N=st.integers(16, 40),
    D=st.integers(8, 20),
    V=st.integers(1, 200),
    budget=st.integers(1, 40_000),
    dtype=st.sampled_from((*DTYPES, torch.float64)),
    softcap=st.sampled_from((None, 3.0)),
    scale=st.sampled_from((0.01, 1.0, 30.0)),
    rank=st.sampled_from((0, 2)),
    seed=st.integers(0, 1000),
)
def test_any_tiling_gives_the_same(N, D, V, budget, dtype, softcap, scale, rank, seed):
    """The workspace decides the tiles; whatever they are, the result stays within the budget."""
    torch.manual_seed(seed)
    check(make_problem(N, D, V, dtype, scale=scale, softcap=softcap, rank=rank), "torch", budget=budget)


def test_finite_differences():
    weights = torch.rand(11, dtype=torch.float64)
    temperature = 0.5 + torch.rand(5, dtype=torch.float64)
    problem = make_problem(5, 4, 11, torch.float64, rank=2, temperature=temperature, softcap=3.0, mean_weight=weights)
    names = differentiable(STREAMED)

    def statistics(input, *head):
        leaves = dict(zip(("weight", "bias", "low_rank"), head, strict=True))
        plan = Plan("torch", torch.float64, 256)
        stats, _ = linear_head_rows(input, head_of(leaves, **problem.options), problem.target, STREAMED, plan)
        return tuple(getattr(stats, name) for name in names)

    input = torch.cat([problem.input, problem.u], 1)
    leaves = [x.requires_grad_() for x in (input, problem.weight, problem.bias, problem.low_rank)]
    assert torch.autograd.gradcheck(statistics, leaves)


def test_the_reference_is_right_too():
    """Its gradients by finite differences, and statistics of two probabilities by hand."""
    h, w = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    stats = linear_head_reference(h, w, p.log(), torch.tensor([1]), top_k=2, top_p=0.6)
    H = 1.5 * math.log(2)
    expected = {
        "lse": 0.0,
        "logprob": math.log(0.25),
        "entropy": H,
        "varentropy": math.log(2) ** 2 / 4,
        "collision": 3 / 8,
        "entropy_drift": 1 / 4 * (H - math.log(2)) + 1 / 8 * (H - 2 * math.log(2)),
        "mean_logprob": -5 / 3 * math.log(2),
        "max_logprob": -math.log(2),
        "topk_mass": 0.75,
        "topk_entropy": math.log(3) - 2 / 3 * math.log(2),
        "nucleus_entropy": H,
        "rank": 1,
        "argmax": 0,
    }
    assert {name: pytest.approx(float(value)) for name, value in stats.items()} == expected
    open_nucleus = linear_head_reference(h, w, p.log(), top_p=0.6, open_nucleus=True)["nucleus_entropy"]
    assert open_nucleus == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl, device):
    problem = make_problem(6, 5, 9, device=device, rank=2, temperature=torch.rand(6, device=device) + 0.5)
    leaves = problem.leaves()
    input = torch.cat([problem.input, problem.u], 1).requires_grad_()
    head = head_of(leaves, **problem.options)
    plan = Plan(impl, torch.float32, BUDGET)
    torch.library.opcheck(
        torch.ops.litropy.linear_head_rows, (input, *head, problem.target, *STREAMED, "", None, *plan, None)
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_parts_cost_nothing_and_get_nothing(impl, device):
    problem = make_problem(20, 8, 90, device=device)
    expected = gradients(*solve(problem, impl)[::2], {"logprob": torch.ones(20, device=device)})
    for name, gradient in expected.items():
        leaf = getattr(problem, name).clone().requires_grad_()
        tensors = {"weight": problem.weight, "bias": problem.bias, "input": problem.input, name: leaf}
        head = Head(tensors["weight"], tensors["bias"])
        stats, _ = linear_head_rows(tensors["input"], head, problem.target, Want(), Plan(impl, problem.dtype, BUDGET))
        (got,) = torch.autograd.grad(stats.logprob.sum(), leaf)
        assert_within_budget(name, got, gradient, gradient.double())
