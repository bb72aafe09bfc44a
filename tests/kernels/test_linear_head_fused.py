"""Loss and gradients in one pass: against stored logits, in any number of blocks, and what happens to the gradients."""

import math

import pytest
import torch
from linear_head_problems import BUDGET, IMPLS, SHAPES, head_of, make_problem, solve_stored

from litropy.kernels.linear_head import Plan
from litropy.kernels.linear_head_fused import RowLoss, pays, rows_that_fit
from litropy.kernels.linear_head_loss import linear_head_loss
from litropy.kernels.linear_head_types import Want
from litropy.testing import assert_within_budget

pytestmark = pytest.mark.usefixtures("poisoned_empty")

BESIDE = Want(entropy=True, argmax=True, varentropy=True, collision=True, entropy_drift=True)
SMOOTHING, Z_LOSS = 0.1, 1e-2


def solve_fused(problem, row_weight, impl="torch", budget=BUDGET, nll_weight=None, want=BESIDE):
    leaves = problem.leaves()
    input = torch.cat([leaves["input"], leaves["u"]], 1) if "u" in leaves else leaves["input"]
    loss = RowLoss(row_weight, nll_weight, SMOOTHING, Z_LOSS)
    plan = Plan(impl, problem.dtype, budget)
    total, stats = linear_head_loss(input, head_of(leaves, **problem.options), problem.target, loss, want, plan)
    return total, stats, leaves


def stored_loss(problem, row_weight, dtype, nll_weight=None):
    """The loss from stored logits and its gradients."""
    stats, leaves = solve_stored(problem, dtype=dtype)
    nll = -stats["logprob"] if nll_weight is None else -nll_weight * stats["logprob"]
    rows = (1 - SMOOTHING) * nll - SMOOTHING * stats["mean_logprob"] + Z_LOSS * stats["lse"].square()
    loss = (rows * row_weight.to(rows.dtype)).sum()
    return loss.detach(), torch.autograd.grad(loss, list(leaves.values())), stats


def check_fused(problem, row_weight, impl="torch", budget=BUDGET, nll_weight=None):
    loss, stats, leaves = solve_fused(problem, row_weight, impl, budget, nll_weight)
    twin, twin_gradients, twin_stats = stored_loss(problem, row_weight, problem.dtype, nll_weight)
    truth, true_gradients, true_stats = stored_loss(problem, row_weight, torch.float64, nll_weight)
    assert_within_budget("loss", loss.detach(), twin, truth)
    for name in ("logprob", "lse", "entropy", "collision", "entropy_drift", "max_logprob"):
        assert_within_budget(name, getattr(stats, name), twin_stats[name].detach(), true_stats[name].detach())
        assert not getattr(stats, name).requires_grad
    got = torch.autograd.grad(loss, list(leaves.values()))
    for name, a, b, c in zip(leaves, got, twin_gradients, true_gradients, strict=True):
        assert_within_budget(f"gradient of {name}", a, b, c)


def budget_for(rows, V, dtype):
    """The least workspace in which so many rows of logits fit."""
    return max(math.ceil(rows * V * dtype.itemsize / 0.7) + 8, 128 * V)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float32, None), (torch.bfloat16, None), (torch.float32, 4.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_in_the_forward_pass(shape, softcap, dtype, impl, device):
    """In as many blocks as the rule for half precision allows."""
    N, _, V = shape
    problem = make_problem(*shape, dtype, device, softcap=softcap)
    row_weight = torch.rand(N, device=device) * (problem.target >= 0)
    check_fused(problem, row_weight, impl, budget_for(max(32, N / 6), V, dtype))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_everything_at_once(dtype, impl, device):
    if dtype == torch.float64 and impl == "triton":
        pytest.skip("Triton computes in float32")
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(301, device=device, dtype=exact) / 301
    temperature = 0.5 + torch.rand(67, device=device, dtype=exact)
    problem = make_problem(
        67, 33, 301, dtype, device, rank=3, softcap=6.0, temperature=temperature, mean_weight=weights
    )
    valid = problem.target >= 0
    row_weight, nll_weight = (torch.rand(67, device=device, dtype=exact) * valid for _ in range(2))
    check_fused(problem, row_weight, impl, budget_for(32, 301, dtype), nll_weight)


@pytest.mark.parametrize("rows", [1, 7, 16, 100])
def test_any_number_of_blocks_gives_the_same(rows):
    problem, row_weight = make_problem(100, 12, 90), torch.rand(100)
    check_fused(problem, row_weight * (problem.target >= 0), budget=budget_for(rows, 90, torch.float32))


def test_half_precision_error_stays_within_budget_at_the_last_allowed_rounding():
    problem = make_problem(600, 24, 2000, torch.bfloat16, ignored=False)
    budget = math.ceil(100 * 2000 * 2 / 0.7) + 8
    assert 96 <= rows_that_fit(600, 2000, torch.bfloat16, budget) <= 112
    assert pays(600, 2000, torch.bfloat16, torch.bfloat16, "cpu", budget)
    assert not pays(800, 2000, torch.bfloat16, torch.bfloat16, "cpu", budget)
    # a gradient in float32 may be summed up in as many blocks as one likes
    assert pays(8000, 2000, torch.bfloat16, torch.float32, "cpu", budget)
    check_fused(problem, torch.full((600,), 1 / 600), budget=budget)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_blocks_in_half_precision_are_summed_in_float32(dtype):
    """Forced where it does not pay, the gradient is still rounded once: hundreds of roundings would stall it."""
    problem = make_problem(640, 8, 40, dtype, ignored=False, bias=False)
    problem = problem.but(input=problem.input.abs())  # all rows pull the same way
    budget = budget_for(4, 40, dtype)
    assert 640 / rows_that_fit(640, 40, dtype, budget) >= 8
    check_fused(problem, torch.ones(640), budget=budget)


@pytest.mark.parametrize("budget", [1, 1 << 14, BUDGET])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 5), (1, 7), (17, 100), (4096, 8), (33, 50257)])
def test_blocks_fit_the_workspace(shape, dtype, budget):
    N, V = shape
    n = rows_that_fit(N, V, dtype, budget)
    assert 0 <= n <= N
    assert n * V * dtype.itemsize <= budget
    assert bool(n) == (N > 0 and budget // 128 >= V)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_are_given_away_not_copied_and_a_retained_graph_still_works(impl, device):
    problem = make_problem(12, 8, 50, device=device, ignored=False, rank=2, temperature=0.7)
    nll_weight = torch.rand(12, device=device)
    loss, _, leaves = solve_fused(problem, torch.rand(12, device=device), impl, nll_weight=nll_weight)
    held = loss.grad_fn.gradients[1].data_ptr()
    (3 * loss).backward(retain_graph=True)
    assert leaves["weight"].grad.data_ptr() == held
    first = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    (3 * loss).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, first[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_gradients_to_give(impl, device):
    """Nothing is multiplied for parts that are frozen, and the loss is the same."""
    problem, row_weight = make_problem(12, 8, 50, device=device), torch.rand(12, device=device)
    expected = solve_fused(problem, row_weight, impl)[0]
    with torch.no_grad():
        loss, stats, _ = solve_fused(problem, row_weight, impl)
    assert not loss.requires_grad
    assert torch.equal(loss, expected)
    assert torch.isfinite(stats.entropy).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("N", [0, 4])
def test_nothing_to_do(N, impl, device):
    problem = make_problem(N, 8, 30, device=device, rank=2)
    problem = problem.but(target=torch.full((N,), -1, device=device))
    loss, stats, leaves = solve_fused(problem, torch.zeros(N, device=device), impl)
    assert loss == 0
    assert not stats.entropy.any()
    loss.backward()
    for leaf in leaves.values():
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl, device):
    problem = make_problem(6, 5, 9, device=device, rank=2)
    leaves = problem.leaves()
    input = torch.cat([problem.input, problem.u], 1).requires_grad_()
    loss = RowLoss(torch.rand(6, device=device), torch.rand(6, device=device), SMOOTHING, Z_LOSS)
    beside, plan = (True, True, True, True, True), ([True] * 4, impl, torch.float32, BUDGET)
    arguments = (input, *head_of(leaves), problem.target, *loss, *beside, *plan)
    # the gradients are outputs here that the backward pass scales in place; test_cut_cross_entropy traces it as used
    torch.library.opcheck(
        torch.ops.litropy.linear_head_loss,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
