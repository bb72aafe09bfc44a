"""Statistics that compare the logits of a row: rank, top-k and nucleus, with exact ties.

Which entries a nucleus holds and how many logits are greater than the target's depend on how logits round. The problems
here either have logits that are exact in every dtype (small integers), or are in float32 with the sets well separated.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_head_problems import (
    BUDGET,
    DTYPES,
    IMPLS,
    STREAMED,
    check,
    exact_logits,
    exact_problem,
    gradients,
    head_of,
    make_problem,
    solve,
    solve_stored,
    well_separated,
)

from litropy.kernels.linear_head import Plan, linear_head_rows
from litropy.kernels.linear_head_types import Want

pytestmark = pytest.mark.usefixtures("poisoned_empty")

NUCLEI = [False, True]
ROWS = {"torch": 30, "triton": 6}  # the interpreter takes its time for every row


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_open", NUCLEI, ids=["closed", "open"])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1.0])
def test_nucleus(top_p, is_open, dtype, impl, device):
    """Integer logits repeat, so nearly every threshold has ties."""
    problem = well_separated(exact_problem(ROWS[impl], 10, 90, dtype, device, temperature=4.0), top_p)
    check(problem, impl, Want(top_p=top_p, open_nucleus=is_open), only=["nucleus_entropy"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("is_open", NUCLEI, ids=["closed", "open"])
def test_nucleus_with_every_option(is_open, impl, device):
    temperature = 1 + torch.rand(ROWS[impl], device=device)
    problem = make_problem(ROWS[impl], 10, 90, device=device, softcap=6.0, temperature=temperature, scale=2.0)
    want = STREAMED._replace(top_p=0.8, open_nucleus=is_open, top_k=5)
    check(well_separated(problem, 0.8), impl, want, budget=1 << 12)


@pytest.mark.parametrize("impl", IMPLS)
def test_all_equal_logits(impl, device):
    """One great tie: the closed nucleus is everything, the open one nothing, and no other logit is greater."""
    problem = exact_problem(4, 3, 50, device=device)
    problem = problem.but(weight=torch.zeros_like(problem.weight), bias=torch.full_like(problem.bias, 7.0))
    closed, _, leaves = solve(problem, impl, Want(top_p=0.1, rank=True, top_k=3))
    torch.testing.assert_close(closed.nucleus_entropy, torch.full((4,), math.log(50), device=device))
    torch.testing.assert_close(closed.topk_entropy, torch.full((4,), math.log(3), device=device))
    torch.testing.assert_close(closed.topk_mass, torch.full((4,), 3 / 50, device=device))
    assert torch.equal(closed.rank, torch.zeros_like(closed.rank))
    ones = {"nucleus_entropy": torch.ones(4, device=device)}
    for gradient in gradients(closed, leaves, ones).values():
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)
    empty, _, leaves = solve(problem, impl, Want(top_p=0.1, open_nucleus=True))
    assert torch.equal(empty.nucleus_entropy, torch.zeros(4, device=device))
    for gradient in gradients(empty, leaves, ones).values():
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_duplicated_entries_stay_together(softcap, impl, device):
    """Each row of the head stands there three times, far apart: a nucleus holds all copies or none."""
    problem = well_separated(make_problem(ROWS[impl], 12, 33, device=device, ignored=False, softcap=softcap), 0.6)
    tripled = problem.but(weight=problem.weight.repeat(3, 1), bias=problem.bias.repeat(3))
    for is_open in NUCLEI:
        want = Want(top_p=0.6, open_nucleus=is_open)
        once = solve_stored(problem, want)[0]["nucleus_entropy"].detach()
        thrice = solve(tripled, impl, want)[0].nucleus_entropy.double()
        several = once > 0
        assert several.sum() > ROWS[impl] // 3
        torch.testing.assert_close(thrice[several], once[several] + math.log(3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rank_counts_what_is_strictly_greater(dtype, impl, device):
    problem = exact_problem(ROWS[impl], 10, 90, dtype, device)
    problem = problem.but(target=problem.target.masked_fill(torch.arange(ROWS[impl], device=device) % 5 == 0, -1))
    stats = solve(problem, impl, Want(rank=True, argmax=True), budget=1 << 12)[0]
    z = exact_logits(problem)
    picked = z.gather(1, problem.target.clamp_min(0)[:, None])
    expected = (z > picked).sum(1).masked_fill(problem.target < 0, 0)
    assert torch.equal(stats.rank, expected)
    # the lowest index among equals
    assert torch.equal(stats.argmax, z.argmax(1).masked_fill(problem.target < 0, 0))
    best = problem.but(target=stats.argmax.masked_fill(problem.target < 0, -1))
    assert not solve(best, impl, Want(rank=True))[0].rank.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_rank_of_a_masked_target(impl, device):
    """Everything that is in the vocabulary ranks before an entry that is not."""
    problem = make_problem(3, 4, 20, device=device, ignored=False)
    bias = problem.bias.index_fill(0, torch.tensor([0, 1, 2], device=device), -math.inf)
    stats = solve(problem.but(bias=bias, target=torch.tensor([0, 1, 2], device=device)), impl, Want(rank=True))[0]
    assert stats.rank.tolist() == [17, 17, 17]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 5, 64])
def test_top_k(k, dtype, impl, device):
    """Which of several equal entries are among the k does not matter; more than there are means all of them."""
    check(exact_problem(ROWS[impl], 10, 40, dtype, device, temperature=3.0), impl, Want(top_k=k))
    stats = solve(exact_problem(ROWS[impl], 10, 40, dtype, device), impl, Want(top_k=k, entropy=True))[0]
    if k == 1:
        assert torch.equal(stats.topk_entropy, torch.zeros_like(stats.topk_entropy))
        torch.testing.assert_close(stats.topk_mass, stats.max_logprob.exp())
    if k > 40:
        torch.testing.assert_close(stats.topk_mass, torch.ones_like(stats.topk_mass))
        torch.testing.assert_close(stats.topk_entropy, stats.entropy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nucleus_of_everything_is_the_vocabulary(impl, device):
    """top_p = 1: the entropy itself, masked entries left out."""
    problem = make_problem(12, 8, 70, device=device)
    bias = problem.bias.index_fill(0, torch.arange(20, 40, device=device), -math.inf)
    problem = problem.but(bias=bias, target=problem.target.where(problem.target < 20, -1))
    stats, _, leaves = solve(problem, impl, Want(entropy=True, top_p=1.0))
    torch.testing.assert_close(stats.nucleus_entropy, stats.entropy, rtol=1e-5, atol=1e-5)
    g = torch.randn(12, device=device)
    nucleus, entropy = (
        [torch.autograd.grad(value, list(leaves.values()), g, retain_graph=True)][0]
        for value in (stats.nucleus_entropy, stats.entropy)
    )
    for a, b in zip(nucleus, entropy, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("is_open", NUCLEI, ids=["closed", "open"])
def test_a_row_sure_of_its_entry(is_open, impl, device):
    """One entry holds all the mass: the closed nucleus is that entry, the open one is empty."""
    problem = exact_problem(4, 3, 50, device=device)
    bias = torch.zeros_like(problem.bias).index_fill(0, torch.tensor([17], device=device), 200.0)
    problem = problem.but(bias=bias)
    stats, _, leaves = solve(problem, impl, Want(top_p=0.9, open_nucleus=is_open, rank=True))
    torch.testing.assert_close(stats.nucleus_entropy, torch.zeros(4, device=device), rtol=0, atol=1e-6)
    for gradient in gradients(stats, leaves, {"nucleus_entropy": torch.ones(4, device=device)}).values():
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_does_not_look_fine(bad, impl, device):
    problem = make_problem(6, 8, 40, device=device, ignored=False)
    input = problem.input.clone()
    input[2, 3] = bad
    stats = solve(problem.but(input=input), impl, Want(top_p=0.5, top_k=4))[0]
    broken = torch.arange(6, device=device) == 2
    for name in ("nucleus_entropy", "topk_entropy", "topk_mass"):
        assert torch.equal(~getattr(stats, name).isfinite(), broken), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("N", [0, 4])
def test_nothing_to_rank(N, impl, device):
    problem = make_problem(N, 8, 30, device=device)
    problem = problem.but(target=torch.full((N,), -1, device=device))
    stats, _, leaves = solve(problem, impl, Want(top_p=0.5, top_k=4, rank=True))
    for name in ("nucleus_entropy", "topk_entropy", "topk_mass", "rank"):
        assert torch.equal(getattr(stats, name), torch.zeros_like(getattr(stats, name)))
    for gradient in gradients(stats, leaves, {"nucleus_entropy": torch.ones(N, device=device)}).values():
        assert torch.equal(gradient, torch.zeros_like(gradient))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    N=st.integers(1, 20),
    V=st.integers(1, 120),
    top_p=st.floats(0.01, 1.0),
    is_open=st.booleans(),
    k=st.integers(1, 64),
    budget=st.integers(1, 40_000),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from((1.0, 4.0, 30.0)),
    seed=st.integers(0, 1000),
)
def test_any_tiling_ranks_alike(N, V, top_p, is_open, k, budget, dtype, temperature, seed):
    torch.manual_seed(seed)
    problem = exact_problem(N, 10, V, dtype, temperature=temperature)
    want = Want(top_p=top_p, open_nucleus=is_open, top_k=k, rank=True)
    stats = solve(problem, "torch", want, budget)[0]
    truth, _ = solve_stored(problem, want)
    assert torch.equal(stats.rank, truth["rank"])
    torch.testing.assert_close(stats.topk_entropy.double(), truth["topk_entropy"].detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.topk_mass.double(), truth["topk_mass"].detach(), rtol=1e-5, atol=1e-6)
    # rounding decides where the mass of some entries is top_p within rounding
    mass = exact_logits(problem).sort(1, descending=True).values.softmax(1).cumsum(1)
    clear = ((mass - top_p).abs() > 1e-5).all(1)
    expected = truth["nucleus_entropy"].detach()[clear]
    torch.testing.assert_close(stats.nucleus_entropy[clear].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_open", NUCLEI, ids=["closed", "open"])
def test_finite_differences(is_open):
    problem = make_problem(5, 4, 11, torch.float64, temperature=0.8, softcap=3.0)
    problem = well_separated(problem, 0.7, distance=1e-3)

    def nucleus(*leaves):
        leaves = dict(zip(("input", "weight", "bias"), leaves, strict=True))
        plan, want = Plan("torch", torch.float64, 256), Want(top_p=0.7, open_nucleus=is_open)
        stats, _ = linear_head_rows(leaves["input"], head_of(leaves, **problem.options), problem.target, want, plan)
        return stats.nucleus_entropy, stats.logprob

    assert torch.autograd.gradcheck(nucleus, list(problem.leaves().values()))


@pytest.mark.parametrize("impl", IMPLS)
def test_ranking_does_not_change_the_other_statistics(impl, device):
    problem, want = make_problem(ROWS[impl], 16, 120, device=device), STREAMED._replace(rank=True, top_k=3, top_p=0.5)
    ranked, streamed = solve(problem, impl, want, BUDGET)[0], solve(problem, impl)[0]
    for name in ("logprob", "lse", "entropy", "mean_logprob", "varentropy", "collision", "entropy_drift", "argmax"):
        torch.testing.assert_close(getattr(ranked, name), getattr(streamed, name), rtol=1e-5, atol=1e-5)
