"""The linear head against stored float64 logits: values, gradients, both implementations, every option, odd shapes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litropy.kernels.linear_head import linear_head_rows
from litropy.kernels.linear_head_fused import fused_rows
from litropy.kernels.linear_head_loss import linear_head_loss
from litropy.kernels.linear_head_reference import linear_head_reference
from litropy.kernels.linear_head_types import Head, RowStats, Want, row_losses
from litropy.testing import assert_within_budget

pytestmark = pytest.mark.usefixtures("poisoned_empty")

NAMES = ("logprob", "lse", "entropy", "mean_logprob")
IMPLS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BUDGET = 64 << 20
ALL = Want(entropy=True, mean_logprob=True, argmax=True)
SHAPES = [
    (1, 1, 1),  # the smallest there is
    (5, 7, 3),  # smaller than any tile
    (67, 33, 301),  # divisible by nothing, several tiles each way
    (130, 70, 129),  # one more than a tile
]


def problem(N, D, V, dtype, device="cpu", bias=True, scale=1.0, ignored=True):
    input = torch.randn(N, D, device=device).to(dtype)
    weight = (scale * torch.randn(V, D, device=device) / math.sqrt(D)).to(dtype)
    bias = torch.randn(V, device=device).to(dtype) if bias else None
    target = torch.randint(V, (N,), device=device)
    if ignored and N > 2:
        target[1::3] = -1
    return input, weight, bias, target


def run_reference(tensors, target, dtype, cotangents, **options):
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in tensors]
    if isinstance(options.get("temperature"), torch.Tensor):
        options["temperature"] = options["temperature"].to(dtype)
    stats = linear_head_reference(*leaves, target, **options)
    total = sum((stats[name] * cotangents[name].to(stats[name].dtype)).sum() for name in cotangents)
    return stats, torch.autograd.grad(total, [x for x in leaves if x is not None])


def run_ours(tensors, target, cotangents, impl, budget=BUDGET, temperature=1.0, softcap=None):
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    input, weight, bias = leaves
    per_row = isinstance(temperature, torch.Tensor)
    head = Head(weight, bias, 1.0 if per_row else 1 / temperature, 1 / temperature if per_row else None, softcap or 0.0)
    stats = linear_head_rows(input, head, target, ALL, impl, budget)
    total = sum((getattr(stats, name) * cotangents[name]).sum() for name in cotangents)
    return stats, torch.autograd.grad(total, [x for x in leaves if x is not None])


def check(tensors, target, impl, budget=BUDGET, **options):
    N, dtype = tensors[0].shape[0], tensors[0].dtype
    cotangents = {name: torch.randn(N, device=tensors[0].device) for name in NAMES}
    ours, gradients = run_ours(tensors, target, cotangents, impl, budget, **options)
    twin, twin_gradients = run_reference(tensors, target, dtype, cotangents, **options)
    truth, true_gradients = run_reference(tensors, target, torch.float64, cotangents, **options)
    for name in NAMES:
        assert_within_budget(name, getattr(ours, name), twin[name], truth[name])
    for name, got, eager, exact in zip("hwb", gradients, twin_gradients, true_gradients, strict=False):
        assert_within_budget(f"d{name}", got, eager, exact)
    # the argmax of exact logits may differ where rounded ones tie: its logit must still be the greatest up to rounding
    chosen = linear_head_reference(*(None if x is None else x.double() for x in tensors), ours.argmax, **options)
    best = linear_head_reference(*(None if x is None else x.double() for x in tensors), truth["argmax"], **options)
    gap = (best["logprob"] - chosen["logprob"])[target >= 0]
    assert (gap <= 4 * torch.finfo(dtype).eps * (1 + best["lse"].abs().max())).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_and_gradients(shape, dtype, impl, device):
    *tensors, target = problem(*shape, dtype, device)
    check(tensors, target, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [{"softcap": 2.0}, {"temperature": 0.7}, {"softcap": 5.0, "temperature": "per row"}],
    ids=["softcap", "temperature", "both"],
)
def test_softcap_and_temperature(options, dtype, impl, device):
    *tensors, target = problem(40, 30, 200, dtype, device, scale=2.0)
    if options.get("temperature") == "per row":
        options = options | {"temperature": 0.5 + torch.rand(40, device=device)}
    check(tensors, target, impl, **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_bias_and_target(impl, device):
    *tensors, target = problem(20, 16, 90, torch.float32, device, bias=False)
    check(tensors, target, impl)
    stats = linear_head_rows(tensors[0], Head(tensors[1], None, 1.0, None, 0.0), None, ALL, impl, BUDGET)
    truth = linear_head_reference(tensors[0].double(), tensors[1].double())
    assert stats.logprob.numel() == 0
    torch.testing.assert_close(stats.entropy.double(), truth["entropy"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offset", [80.0, -200.0, 1000.0])
def test_large_offsets_keep_their_digits(offset, impl, device):
    """A bias that all logits share changes neither entropy nor log-probabilities; raw sums of z exp z lose digits."""
    input, weight, _, target = problem(16, 8, 500, torch.float32, device, ignored=False)
    plain, shifted = (
        linear_head_rows(
            input, Head(weight, torch.full((500,), b, device=device), 1.0, None, 0.0), target, ALL, impl, BUDGET
        )
        for b in (0.0, offset)
    )
    slack = 4 * torch.finfo(torch.float32).eps * abs(offset)
    for name in ("entropy", "logprob", "mean_logprob"):
        torch.testing.assert_close(getattr(shifted, name), getattr(plain, name), rtol=0, atol=slack)


@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_logits(impl, device):
    """Nearly one-hot rows and logits in the thousands: finite, and within the budget."""
    *tensors, target = problem(24, 16, 150, torch.float32, device, scale=300.0)
    check(tensors, target, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_vocabulary(impl, device):
    """A bias of -inf takes entries out of the vocabulary, whole tiles included; the rest is unharmed."""
    input, weight, _, target = problem(9, 8, 300, torch.float32, device, ignored=False)
    target %= 20
    bias = torch.full((300,), -math.inf, device=device)
    bias[:20] = 0
    leaves = [input.requires_grad_(), weight.requires_grad_()]
    stats = linear_head_rows(input, Head(weight, bias, 1.0, None, 0.0), target, Want(entropy=True), impl, 1 << 12)
    got = torch.autograd.grad((stats.logprob + stats.entropy).sum(), leaves)
    small = linear_head_rows(input, Head(weight[:20], None, 1.0, None, 0.0), target, Want(entropy=True), impl, BUDGET)
    expected = torch.autograd.grad((small.logprob + small.entropy).sum(), leaves)
    torch.testing.assert_close(stats.entropy, small.entropy)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_propagate(bad, impl, device):
    input, weight, bias, target = problem(6, 8, 40, torch.float32, device, ignored=False)
    input[2, 3] = bad
    stats = linear_head_rows(input, Head(weight, bias, 1.0, None, 0.0), target, ALL, impl, BUDGET)
    broken = torch.zeros(6, dtype=torch.bool, device=device)
    broken[2] = True
    for name in ("logprob", "entropy"):
        assert torch.equal(~getattr(stats, name).isfinite(), broken), name


@pytest.mark.parametrize("impl", IMPLS)
def test_non_contiguous_inputs_and_cotangents(impl, device):
    input, weight, bias, target = problem(24, 20, 60, torch.float32, device)
    strided = [input.t().contiguous().t(), weight.t().contiguous().t(), bias[:, None].expand(-1, 2)[:, 0]]
    check(strided, target, impl)
    leaf = input.detach().requires_grad_()
    stats = linear_head_rows(leaf, Head(weight, bias, 1.0, None, 0.0), target, ALL, impl, BUDGET)
    (got,) = torch.autograd.grad(stats.logprob, leaf, torch.ones((), device=device).expand(24), retain_graph=True)
    (expected,) = torch.autograd.grad(stats.logprob, leaf, torch.ones(24, device=device))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("N", [0, 4])
def test_nothing_to_do(N, impl, device):
    """No rows, or none that counts: zeros, connected to the graph."""
    input, weight, bias, _ = problem(N, 8, 30, torch.float32, device)
    target = torch.full((N,), -1, device=device)
    stats, gradients = run_ours(
        (input, weight, bias), target, {name: torch.ones(N, device=device) for name in NAMES}, impl
    )
    for name in (*NAMES, "argmax"):
        assert torch.equal(getattr(stats, name), torch.zeros_like(getattr(stats, name)))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
    assert [g.shape for g in gradients] == [input.shape, weight.shape, bias.shape]


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
    seed=st.integers(0, 1000),
)
def test_any_tiling_gives_the_same(N, D, V, budget, dtype, softcap, scale, seed):
    """The workspace decides the tiles; whatever they are, the result stays within the budget."""
    torch.manual_seed(seed)
    *tensors, target = problem(N, D, V, dtype, scale=scale)
    check(tensors, target, "torch", budget, softcap=softcap)


def fused(tensors, target, row_weight, budget=BUDGET, smoothing=0.1, z_loss=1e-2, softcap=None):
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    head = Head(leaves[1], leaves[2], 1.0, None, softcap or 0.0)
    return linear_head_loss(
        leaves[0], head, target, row_weight, smoothing, z_loss, Want(True, False, True), budget
    ), leaves


def reference_loss(tensors, target, row_weight, dtype, smoothing=0.1, z_loss=1e-2, softcap=None):
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    stats = linear_head_reference(*leaves, target, softcap=softcap)
    rows = row_losses(RowStats(**stats, max_logit=stats["lse"], max_logprob=stats["lse"]), smoothing, z_loss)
    loss = (rows * row_weight.to(rows.dtype)).sum()
    return loss, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_in_the_forward_pass(shape, softcap, dtype):
    """Loss and gradients of the fused way, in as many blocks as the rule for half precision allows."""
    *tensors, target = problem(*shape, dtype)
    row_weight = torch.rand(shape[0]) * (target >= 0)
    element = tensors[1].element_size()
    budget = max(math.ceil(max(32, shape[0] / 6) * shape[2] * element / 0.7) + 8, 128 * shape[2])
    (loss, _), leaves = fused(tensors, target, row_weight, budget, softcap=softcap)
    got = torch.autograd.grad(loss, leaves)
    twin, twin_gradients = reference_loss(tensors, target, row_weight, dtype, softcap=softcap)
    truth, true_gradients = reference_loss(tensors, target, row_weight, torch.float64, softcap=softcap)
    assert_within_budget("loss", loss, twin, truth)
    for name, a, b, c in zip("hwb", got, twin_gradients, true_gradients, strict=True):
        assert_within_budget(f"d{name}", a, b, c)


def test_half_precision_error_stays_within_budget_at_the_last_allowed_rounding():
    *tensors, target = problem(600, 24, 2000, torch.bfloat16, ignored=False)
    row_weight = torch.full((600,), 1 / 600)
    head = Head(tensors[1], tensors[2], 1.0, None, 0.0)
    budget = math.ceil(100 * 2000 * 2 / 0.7) + 8
    assert fused_rows(600, head, budget) == 100
    assert fused_rows(601, head, budget) == 0
    (loss, _), leaves = fused(tensors, target, row_weight, budget)
    got = torch.autograd.grad(loss, leaves)
    _, twin = reference_loss(tensors, target, row_weight, torch.bfloat16)
    _, truth = reference_loss(tensors, target, row_weight, torch.float64)
    for name, a, b, c in zip("hwb", got, twin, truth, strict=True):
        assert_within_budget(f"d{name}", a, b, c)


def test_gradients_are_given_away_not_copied_and_a_retained_graph_still_works():
    *tensors, target = problem(12, 8, 50, torch.float32, ignored=False)
    (loss, _), leaves = fused(tensors, target, torch.rand(12))
    held = loss.grad_fn.gradients[1].data_ptr()
    (3 * loss).backward(retain_graph=True)
    assert leaves[1].grad.data_ptr() == held
    first = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    (3 * loss).backward()
    for leaf, expected in zip(leaves, first, strict=True):
        torch.testing.assert_close(leaf.grad, expected)


def test_finite_differences():
    input, weight, bias, target = (x.double() if x.is_floating_point() else x for x in problem(5, 4, 11, torch.float32))
    leaves = [x.requires_grad_() for x in (input, weight, bias)]

    def statistics(input, weight, bias):
        stats = linear_head_rows(input, Head(weight, bias, 0.8, None, 3.0), target, ALL, "torch", 256)
        return stats.logprob, stats.lse, stats.entropy, stats.mean_logprob

    assert torch.autograd.gradcheck(statistics, leaves)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl, device):
    input, weight, bias, target = problem(6, 5, 9, torch.float32, device)
    leaves = [x.requires_grad_() for x in (input, weight, bias)]
    arguments = (*leaves, target, 1.0, None, 0.0, True, True, True, impl, BUDGET)
    torch.library.opcheck(torch.ops.litropy.linear_head_rows, arguments)


def test_opcheck_of_the_fused_loss():
    input, weight, bias, target = problem(6, 5, 9, torch.float32)
    leaves = [x.requires_grad_() for x in (input, weight, bias)]
    arguments = (*leaves, target, torch.rand(6), 1.0, None, 0.0, 0.1, 1e-2, True, True, True, True, True, BUDGET)
    # the gradients are outputs here that the backward pass scales in place; test_cut_cross_entropy traces it as used
    torch.library.opcheck(
        torch.ops.litropy.linear_head_loss,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
