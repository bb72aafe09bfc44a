"""Where gradients go and in which precision: main_grad, autocast, tied and frozen heads, modes, accumulation."""

import pytest
import torch
import torch.nn.functional as F
from linear_head_problems import IMPLS
from torch.utils.checkpoint import checkpoint

from litropy.losses import linear_cross_entropy, linear_head_stats
from litropy.testing import assert_within_budget


def tensors(N=40, D=12, V=57, dtype=torch.float32, device="cpu"):
    input = torch.randn(N, D, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, device=device) / 3).to(dtype).requires_grad_()
    target = torch.randint(V, (N,), device=device).masked_fill(torch.arange(N, device=device) % 4 == 0, -100)
    return input, weight, target


def exact_gradients(input, weight, target):
    """Of the mean cross-entropy, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (input, weight)]
    return torch.autograd.grad(F.cross_entropy(F.linear(*leaves), target), leaves)


def uniform(N, V=64, dtype=torch.bfloat16, device="cpu"):
    """Hidden states of 1 and a head of 0: dW is N / V and N / V - N, which float32 holds and bfloat16 does not."""
    input = torch.ones(N, 3, device=device).to(dtype).requires_grad_()
    weight = torch.zeros(V, 3, device=device).to(dtype).requires_grad_()
    expected = torch.full((V, 3), N / V, device=device)
    expected[0] -= N
    assert not torch.equal(expected, expected.bfloat16().float())
    return input, weight, torch.zeros(N, dtype=torch.int64, device=device), expected


def assert_summed_in_float32(got, expected):
    """Exact on a GPU; a CPU has no product of bfloat16 matrices in float32 and rounds that of each block of rows."""
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0 if got.is_cuda else 2**-8, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_main_grad_takes_the_gradient_and_grad_stays_none(impl, reduction, device):
    input, weight, target, expected = uniform(203, device=device)
    weight.main_grad = torch.zeros_like(expected)
    held = weight.main_grad.data_ptr()
    for part in (slice(0, 100), slice(100, 203)):
        linear_cross_entropy(input[part], weight, target[part], reduction=reduction, impl=impl).sum().backward()
    assert weight.grad is None
    assert weight.main_grad.data_ptr() == held
    assert_summed_in_float32(weight.main_grad, expected)
    assert input.grad.dtype == torch.bfloat16


def test_main_grad_does_not_stall_over_many_calls():
    """What bfloat16 has no digits for once the sum has grown: 300 times 1 / 64 would stop at 4."""
    input, weight, target, expected = uniform(300)
    weight.main_grad = torch.zeros_like(expected)
    for n in range(300):
        linear_cross_entropy(input[n : n + 1], weight, target[n : n + 1]).backward()
    assert torch.equal(weight.main_grad, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["fast", "lean"])
@pytest.mark.parametrize("budget", [64, 0.02])
def test_autocast_sums_the_weight_gradient_in_float32(impl, mode, budget, device):
    """In one block of rows or in many, the gradient of a float32 weight has the digits of float32."""
    input, weight, target, expected = uniform(1201 if impl == "torch" else 203, dtype=torch.float32, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = linear_cross_entropy(
            input, weight, target, reduction="sum", mode=mode, memory_budget_mib=budget, impl=impl
        )
    loss.backward()
    assert input.grad.dtype == torch.float32
    assert_summed_in_float32(weight.grad, expected)


@pytest.mark.parametrize("mode", ["fast", "lean"])
def test_autocast_computes_in_half_precision(mode):
    input, weight, target = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(input, weight, target, mode=mode)
        twin = torch.autograd.grad(F.cross_entropy(F.linear(input, weight).float(), target), [input, weight])
    assert torch.equal(loss, linear_cross_entropy(input.bfloat16(), weight.bfloat16(), target, mode=mode))
    for name, a, b, c in zip(
        ("input", "weight"), torch.autograd.grad(loss, [input, weight]), twin, exact_gradients(input, weight, target),
        strict=True,
    ):  # fmt: skip
        assert_within_budget(name, a, b, c)


def test_main_grad_may_hold_something_already():
    input, weight, target = tensors()
    weight.main_grad = torch.full((57, 12), 3.0)
    linear_cross_entropy(input, weight, target).backward()
    _, truth = exact_gradients(input, weight, target)
    torch.testing.assert_close(weight.main_grad.double(), truth + 3.0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("part", ["weight", "everything"])
def test_main_grad_of_a_frozen_head_stays_as_it_is(part):
    input, weight, target = tensors()
    weight = weight.detach()
    weight.main_grad = torch.zeros(57, 12)
    input.requires_grad_(part == "weight")
    loss = linear_cross_entropy(input, weight, target)
    if part == "weight":
        loss.backward()
    assert not weight.main_grad.any()


def test_main_grad_of_statistics_and_low_rank():
    input, weight, target = tensors()
    u, matrix = torch.randn(40, 3, requires_grad=True), torch.randn(57, 3, requires_grad=True)
    expected = torch.autograd.grad(
        linear_head_stats(input, weight, target, low_rank=(u, matrix)).entropy.sum(), [input, weight, u, matrix]
    )
    weight.main_grad = torch.zeros(57, 12)
    linear_head_stats(input, weight, target, low_rank=(u, matrix)).entropy.sum().backward()
    for got, want in zip((input.grad, weight.main_grad, u.grad, matrix.grad), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert weight.grad is None


def test_main_grad_under_compile():
    input, weight, target = tensors()
    weight.main_grad = torch.zeros(57, 12)
    compiled = torch.compile(lambda h: linear_cross_entropy(h, weight, target), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled(input).backward()
    _, truth = exact_gradients(input, weight, target)
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad.double(), 2 * truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_parts_get_no_gradient(frozen, reduction):
    input, weight, target = tensors()
    leaves = [x.detach().requires_grad_(i not in frozen) for i, x in enumerate((input, weight, torch.randn(57)))]
    linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], reduction=reduction).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [i in frozen for i in range(3)]


@pytest.mark.parametrize("mode", ["fast", "lean"])
def test_tied_head_accumulates_both_gradients(mode, device):
    weight = torch.randn(30, 8, device=device, requires_grad=True)
    ids = torch.randint(30, (12,), device=device)
    linear_cross_entropy(F.embedding(ids, weight).tanh(), weight, ids.roll(-1), mode=mode).backward()
    got, weight.grad = weight.grad, None
    F.cross_entropy(F.linear(F.embedding(ids, weight).tanh(), weight), ids.roll(-1)).backward()
    torch.testing.assert_close(got, weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["fast", "lean"])
def test_one_head_in_two_losses(mode):
    """Gradients that are given away must not become each other's."""
    input, weight, target = tensors()
    other = torch.randn(40, 12, requires_grad=True)
    losses = [linear_cross_entropy(h, weight, target, mode=mode) for h in (input, other)]
    (losses[0] + 2 * losses[1]).backward()
    first, second = exact_gradients(input, weight, target), exact_gradients(other, weight, target)
    torch.testing.assert_close(weight.grad.double(), first[1] + 2 * second[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(input.grad.double(), first[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other.grad.double(), 2 * second[0], rtol=1e-5, atol=1e-6)


def test_gradients_accumulate_over_calls():
    input, weight, target = tensors()
    for part in (slice(0, 20), slice(20, 40)):
        linear_cross_entropy(input[part], weight, target[part], num_items=(target >= 0).sum()).backward()
    for got, want in zip((input.grad, weight.grad), exact_gradients(input, weight, target), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["fast", "lean"])
def test_activation_checkpointing_runs_the_loss_twice(mode):
    input, weight, target = tensors()
    loss = checkpoint(linear_cross_entropy, input, weight, target, mode=mode, use_reentrant=False)
    got = torch.autograd.grad(loss, [input, weight])
    for a, b in zip(got, exact_gradients(input, weight, target), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["fast", "lean"])
def test_a_retained_graph_can_be_walked_again(mode):
    input, weight, target = tensors()
    loss = linear_cross_entropy(input, weight, target, mode=mode, z_loss=1e-2, temperature=0.7)
    first = [x.clone() for x in torch.autograd.grad(2 * loss, [input, weight], retain_graph=True)]
    for a, b in zip(torch.autograd.grad(2 * loss, [input, weight]), first, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["fast", "lean"])
def test_second_derivatives_are_refused_not_wrong(mode):
    """A gradient penalty through the loss would silently be 0 if first derivatives did not know their history."""
    input, weight, target = tensors()
    loss = linear_cross_entropy(input, weight, target, mode=mode)

    def penalty():
        (gradient,) = torch.autograd.grad(loss, input, create_graph=True)
        gradient.square().sum().backward()

    with pytest.raises(RuntimeError):
        penalty()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    input, weight, target = tensors()
    expected = linear_cross_entropy(input, weight, target)
    with context():
        loss, stats = linear_cross_entropy(input, weight, target, return_stats=("entropy",))
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())
    assert torch.isfinite(stats.entropy).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_modes_agree(impl, device):
    input, weight, target = tensors(device=device)
    u, matrix = torch.randn(40, 3, device=device), torch.randn(57, 3, device=device)
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 4.0, "low_rank": (u, matrix), "impl": impl}
    results = []
    for mode in ("fast", "lean", "auto"):
        loss = linear_cross_entropy(input, weight, target, mode=mode, **options)
        results.append([loss.detach(), *torch.autograd.grad(loss, [input, weight])])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "none"}, "'none'"),
        ({"skip_tol": 1e-3}, "skip_tol"),
        ({"return_stats": ("rank",)}, "rank"),
        ({"memory_budget_mib": 1e-5}, "not a single row of 57 logits"),
        ({"dtype": torch.float16}, "float16"),
        ({"main_grad": True}, "main_grad"),
    ],
)
def test_fast_mode_says_what_is_in_its_way(options, message):
    options = dict(options)
    input, weight, target = tensors(dtype=options.pop("dtype", torch.float32))
    if options.pop("main_grad", False):
        weight.main_grad = torch.zeros(57, 12)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(input, weight, target, mode="fast", **options)
    linear_cross_entropy(input, weight, target, mode="auto", **options)
    # without gradients there is nothing to form in the forward pass, and nothing in its way
    linear_cross_entropy(input.detach(), weight.detach(), target, mode="fast", **options)


def test_lean_mode_forms_no_gradient_before_it_is_needed(monkeypatch):
    import litropy.losses.cut_cross_entropy as module

    def fused(*_, **__):
        raise AssertionError("the forward pass formed gradients")

    input, weight, target = tensors()
    monkeypatch.setattr(module, "linear_head_loss", fused)
    linear_cross_entropy(input, weight, target, mode="lean").backward()
    with pytest.raises(AssertionError, match="formed gradients"):
        linear_cross_entropy(input, weight, target, mode="auto")
