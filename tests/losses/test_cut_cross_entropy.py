"""The loss: agreement with torch, bookkeeping of tokens, precision, torch.compile, memory."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from linear_head_problems import IMPLS

from litropy.losses import CutCrossEntropyLoss, HeadStats, linear_cross_entropy
from litropy.testing import assert_within_budget


@pytest.fixture
def problem(device):
    input = torch.randn(4, 9, 12, device=device, requires_grad=True)
    weight = torch.randn(57, 12, device=device, requires_grad=True)
    bias = torch.randn(57, device=device, requires_grad=True)
    target = torch.randint(57, (4, 9), device=device)
    target[0, :4] = -100
    return input, weight, bias, target


def gradients(loss, leaves, cotangent=None):
    return torch.autograd.grad(loss, leaves, cotangent)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["fast", "lean"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_equals_torch(problem, impl, mode, reduction, smoothing, weighted):
    if (mode, reduction) == ("fast", "none"):
        pytest.skip("needs the backward pass")
    *leaves, target = problem
    input, weight, bias = leaves
    class_weight = torch.rand(57, device=input.device).index_fill(0, target[1, :2], 0.0) if weighted else None
    options = {"reduction": reduction, "label_smoothing": smoothing, "weight": class_weight}
    loss = linear_cross_entropy(input, weight, target, linear_bias=bias, impl=impl, mode=mode, **options)
    expected = F.cross_entropy(F.linear(input, weight, bias).flatten(0, 1), target.flatten(), **options)
    expected = expected.view(loss.shape)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(loss)
    for got, want in zip(gradients(loss, leaves, cotangent), gradients(expected, leaves, cotangent), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["fast", "lean"])
def test_a_rows_loss_as_documented(problem, impl, mode):
    """Every option of the formula in the docstring, written out in float64, and the statistics beside it."""
    input, weight, bias, target = problem
    leaves = [x.detach().requires_grad_() for x in (input, weight, bias)]
    device = input.device
    temperature, token_weight = 0.5 + torch.rand(4, 9, device=device), torch.rand(4, 9, device=device)
    class_weight = torch.rand(57, device=device)
    loss, stats = linear_cross_entropy(
        *leaves[:2],
        target,
        linear_bias=leaves[2],
        weight=class_weight,
        label_smoothing=0.2,
        z_loss=0.01,
        softcap=6.0,
        temperature=temperature,
        token_weight=token_weight,
        num_items=torch.tensor(50, device=device),
        return_stats=("logprob", "entropy", "lse", "argmax"),
        mode=mode,
        impl=impl,
    )
    exact = [x.detach().double().requires_grad_() for x in (input, weight, bias)]
    c = class_weight.double()
    z = 6 * torch.tanh(F.linear(*exact) / 6) / temperature.double()[..., None]
    logp, lse, valid = z.log_softmax(-1), z.logsumexp(-1), target >= 0
    label = target.clamp_min(0)
    picked = logp.gather(-1, label[..., None])[..., 0]
    rows = token_weight * (-0.8 * c[label] * picked - 0.2 * (c * logp).mean(-1) + 0.01 * lse**2)
    expected = rows[valid].sum() / 50
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for got, want in zip(gradients(loss, leaves), gradients(expected, exact), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
    values = {"logprob": picked, "lse": lse, "entropy": -(logp.exp() * logp).sum(-1), "argmax": z.argmax(-1)}
    for name, value in values.items():
        got = getattr(stats, name)
        assert got.shape == target.shape
        assert not got.requires_grad
        torch.testing.assert_close(got.double(), torch.where(valid, value, 0).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0,), (2, 3)], ids=["empty", "ignored"])
@pytest.mark.parametrize("skip_tol", [0.0, 1e-3])
def test_nothing_to_learn_from(impl, reduction, shape, skip_tol, device):
    """A loss of 0 that is connected to every parameter: DistributedDataParallel waits for all of them."""
    input, weight, bias = (torch.randn(*x, device=device, requires_grad=True) for x in ((*shape, 8), (20, 8), (20,)))
    target = torch.full(shape, -100, device=device)
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "weight": torch.rand(20, device=device)}
    loss, stats = linear_cross_entropy(
        input, weight, target, linear_bias=bias, reduction=reduction, skip_tol=skip_tol,
        return_stats=("entropy", "logprob"), impl=impl, **options,
    )  # fmt: skip
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(stats.entropy, torch.zeros(shape, device=device))
    loss.sum().backward()
    for leaf in (input, weight, bias):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_step_without_items_has_no_loss(impl, as_tensor, device):
    input = torch.randn(6, 8, device=device, requires_grad=True)
    weight = torch.randn(20, 8, device=device, requires_grad=True)
    num_items = torch.tensor(0, device=device) if as_tensor else 0
    target = torch.full((6,), -100, device=device)
    loss = linear_cross_entropy(input, weight, target, num_items=num_items, impl=impl)
    assert loss == 0
    loss.backward()
    assert torch.equal(input.grad, torch.zeros_like(input))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_any_ignore_index(problem):
    input, weight, _, target = problem
    padded = target.masked_fill(target < 0, 3)
    loss = linear_cross_entropy(input, weight, padded, ignore_index=3)
    expected = F.cross_entropy(F.linear(input, weight).flatten(0, 1), padded.flatten(), ignore_index=3)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 4)])
def test_any_number_of_leading_dimensions(shape):
    input, weight = torch.randn(*shape, 8), torch.randn(20, 8)
    target = torch.randint(20, shape)
    losses, stats = linear_cross_entropy(input, weight, target, reduction="none", return_stats=("entropy",))
    assert losses.shape == stats.entropy.shape == shape
    expected = F.cross_entropy(input.reshape(-1, 8) @ weight.t(), target.reshape(-1), reduction="none")
    torch.testing.assert_close(losses.reshape(-1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_loss(problem, dtype):
    input, weight, _, target = problem
    loss = linear_cross_entropy(input.to(dtype), weight.to(dtype), target)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hidden_states_are_cast_to_the_dtype_of_the_head(problem, dtypes, reduction):
    """As for a float32 norm before a half-precision head; each gradient comes in the dtype of its tensor."""
    input, weight = (x.detach().to(dtype).requires_grad_() for x, dtype in zip(problem[:2], dtypes, strict=True))
    loss = linear_cross_entropy(input, weight, problem[3], reduction=reduction)
    expected = linear_cross_entropy(input.to(weight.dtype), weight, problem[3], reduction=reduction)
    assert torch.equal(loss, expected)
    for gradient, leaf in zip(gradients(loss.sum(), [input, weight]), (input, weight), strict=True):
        assert gradient.dtype == leaf.dtype


def test_module_is_the_function(problem):
    input, weight, bias, target = problem
    class_weight = torch.rand(57, device=input.device)
    options = {"reduction": "sum", "z_loss": 1e-3, "softcap": 5.0, "label_smoothing": 0.1, "mode": "lean"}
    module = CutCrossEntropyLoss(weight=class_weight, return_stats=("argmax",), **options)
    assert not list(module.parameters())
    assert torch.equal(module.state_dict()["weight"], class_weight)
    token_weight = torch.rand(4, 9, device=input.device)
    loss, stats = module(input, weight, target, bias, token_weight=token_weight)
    expected = linear_cross_entropy(
        input, weight, target, linear_bias=bias, weight=class_weight, token_weight=token_weight, **options
    )
    assert torch.equal(loss, expected)
    assert isinstance(stats, HeadStats)
    assert "softcap=5.0" in repr(module)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_precision_is_within_budget(reduction):
    """Through the public function, against eager torch in the same dtype."""
    input, weight = torch.randn(200, 64).bfloat16(), (torch.randn(1000, 64) / 8).bfloat16()
    target = torch.randint(1000, (200,))

    def run(loss_of, dtype):
        leaves = [input.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        loss = loss_of(*leaves).mean()
        return [loss.detach(), *gradients(loss, leaves)]

    def eager(input, weight):
        z = F.linear(input, weight)
        return F.cross_entropy(z if z.dtype == torch.float64 else z.float(), target, reduction="none")

    ours = run(lambda h, w: linear_cross_entropy(h, w, target, reduction=reduction), torch.bfloat16)
    twin, truth = run(eager, torch.bfloat16), run(eager, torch.float64)
    for name, got, a, b in zip(("loss", "dh", "dw"), ours, twin, truth, strict=True):
        assert_within_budget(name, got, a, b)


def test_loss_scaling_saves_small_gradients_in_float16():
    """The scale arrives with the backward pass; gradients that float16 cannot hold without it must not be lost."""
    input, weight = (1 + torch.randn(1000, 16)).half(), (torch.randn(20_000, 16) / 8).half()
    target = torch.randint(20_000, (1000,))

    def run(dtype, loss_of):
        leaves = [input.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        return gradients(loss_of(*leaves, target) * 4096, leaves)

    def eager(input, weight, target):
        return F.cross_entropy(F.linear(input, weight).to(torch.promote_types(input.dtype, torch.float32)), target)

    ours, twin, truth = (
        run(torch.float16, linear_cross_entropy),
        run(torch.float16, eager),
        run(torch.float64, eager),
    )
    for name, got, a, b in zip(("dh", "dw"), ours, twin, truth, strict=True):
        assert_within_budget(name, got, a, b)


MEMORY = """
import os, sys, torch
from litropy.losses import linear_cross_entropy

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

def step(dtype, reduction, skip_tol, N, D, V):
    h, w = torch.randn(N, D, dtype=dtype, requires_grad=True), torch.randn(V, D, dtype=dtype, requires_grad=True)
    y = torch.randint(V, (N,))
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    loss, _ = linear_cross_entropy(h, w, y, reduction=reduction, skip_tol=skip_tol, return_stats=("entropy",))
    loss.mean().backward()
    return status("VmHWM") - before - (h.grad.nbytes + w.grad.nbytes) / 2**20

for case in sys.argv[1:]:
    if os.fork() == 0:  # a process for each, in which nothing has been freed that could be used again
        dtype, reduction, skip_tol, width = case.split()
        options = (getattr(torch, dtype), reduction, float(skip_tol))
        step(*options, 64, 64, 512)
        print(step(*options, 2048, int(width), 32768), flush=True)
        os._exit(0)
    os.wait()
"""
CASES = ["float32 mean 0 64", "float32 none 1e-3 64", "bfloat16 mean 0 64", "bfloat16 none 0 512"]


@pytest.fixture(scope="module")
def peaks():
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    done = subprocess.run([sys.executable, "-c", MEMORY, *CASES], capture_output=True, text=True, check=True)
    return dict(zip(CASES, map(float, done.stdout.split()), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_memory_beyond_the_gradients(case, peaks):
    """At most 64 MiB where stored logits would take 256 (128 in half precision) and their gradient as much again."""
    assert 4 < peaks[case] <= 64
