"""The public losses: agreement with torch, reductions, bookkeeping of tokens, memory, errors."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from litropy.losses import CutCrossEntropyLoss, HeadStats, linear_cross_entropy, linear_head_stats
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


IMPLS = ["torch", "triton"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_torch(problem, impl, reduction, smoothing):
    *leaves, target = problem
    options = {"reduction": reduction, "label_smoothing": smoothing}
    input, weight, bias = leaves
    loss = linear_cross_entropy(input, weight, target, linear_bias=bias, impl=impl, **options)
    expected = F.cross_entropy(F.linear(input, weight, bias).flatten(0, 1), target.flatten(), **options)
    expected = expected.view(loss.shape)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(loss)
    for got, want in zip(gradients(loss, leaves, cotangent), gradients(expected, leaves, cotangent), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["fused", "recomputed"])
def test_options_together(problem, impl, mode):
    """z-loss, softcap, a temperature for each token and num_items, against the formula written out in float64."""
    input, weight, bias, target = problem
    leaves = [x.detach().requires_grad_() for x in (input, weight, bias)]
    temperature = 0.5 + torch.rand(4, 9, device=input.device)
    # a budget of a few rows makes the PyTorch implementation recompute
    budget = 64 if mode == "fused" else 0.002
    loss, stats = linear_cross_entropy(
        *leaves[:2],
        target,
        linear_bias=leaves[2],
        label_smoothing=0.2,
        z_loss=0.01,
        softcap=6.0,
        temperature=temperature,
        num_items=torch.tensor(50, device=input.device),
        return_stats=("logprob", "entropy", "lse", "argmax"),
        memory_budget_mib=budget,
        impl=impl,
    )
    exact = [x.detach().double().requires_grad_() for x in (input, weight, bias)]
    z = 6 * torch.tanh(F.linear(*exact) / 6) / temperature.double()[..., None]
    logp, lse, valid = z.log_softmax(-1), z.logsumexp(-1), target >= 0
    picked = logp.gather(-1, target.clamp_min(0)[..., None])[..., 0]
    rows = -0.8 * picked - 0.2 * logp.mean(-1) + 0.01 * lse**2
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
def test_statistics_are_differentiable(problem, impl):
    input, weight, bias, target = problem
    stats = linear_head_stats(input, weight, target, linear_bias=bias, stats=("logprob", "entropy", "lse"), impl=impl)
    assert stats.argmax is None
    logp = F.linear(input.double(), weight.double(), bias.double()).log_softmax(-1)
    entropy = torch.where(target >= 0, -(logp.exp() * logp).sum(-1), 0)
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    got = gradients(stats.entropy.sum(), [input, weight, bias])
    for a, b in zip(got, gradients(entropy.sum(), [input, weight, bias]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_statistics_of_every_row_without_a_target(problem):
    input, weight, bias, _ = problem
    stats = linear_head_stats(input, weight, linear_bias=bias, stats=("entropy", "argmax"))
    assert stats.entropy.shape == (4, 9)
    assert torch.equal(stats.argmax, F.linear(input, weight, bias).argmax(-1))
    with pytest.raises(ValueError, match="needs a `target`"):
        linear_head_stats(input, weight)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0,), (2, 3)], ids=["empty", "ignored"])
def test_nothing_to_learn_from(impl, reduction, shape, device):
    input = torch.randn(*shape, 8, device=device, requires_grad=True)
    weight = torch.randn(20, 8, device=device, requires_grad=True)
    target = torch.full(shape, -100, device=device)
    loss = linear_cross_entropy(input, weight, target, reduction=reduction, impl=impl)
    assert torch.equal(loss, torch.zeros_like(loss))
    loss.sum().backward()
    assert torch.equal(input.grad, torch.zeros_like(input))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_of_the_loss(problem, dtype):
    input, weight, _, target = problem
    loss = linear_cross_entropy(input.to(dtype), weight.to(dtype), target)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_autocast_computes_in_half_precision(problem):
    input, weight, _, target = problem
    with torch.autocast(input.device.type, torch.bfloat16):
        loss = linear_cross_entropy(input, weight, target)
    expected = linear_cross_entropy(input.bfloat16(), weight.bfloat16(), target)
    assert torch.equal(loss, expected)
    loss.backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_parts_get_no_gradient(problem, frozen, reduction):
    *tensors, target = problem
    leaves = [x.detach().requires_grad_(i != frozen) for i, x in enumerate(tensors)]
    linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], reduction=reduction).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(3)]


def test_tied_head_accumulates_both_gradients(device):
    weight = torch.randn(30, 8, device=device, requires_grad=True)
    ids = torch.randint(30, (12,), device=device)
    linear_cross_entropy(F.embedding(ids, weight).tanh(), weight, ids.roll(-1)).backward()
    got, weight.grad = weight.grad, None
    F.cross_entropy(F.linear(F.embedding(ids, weight).tanh(), weight), ids.roll(-1)).backward()
    torch.testing.assert_close(got, weight.grad, rtol=1e-4, atol=1e-6)


def test_gradients_accumulate_over_calls(problem):
    input, weight, _, target = problem
    leaves = [input.detach().requires_grad_(), weight.detach().requires_grad_()]
    for part in (slice(0, 2), slice(2, 4)):
        linear_cross_entropy(leaves[0][part], leaves[1], target[part], num_items=(target >= 0).sum()).backward()
    expected = gradients(linear_cross_entropy(input, weight, target), [input, weight])
    for leaf, want in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_graph_breaks(reduction):
    def loss_and_entropy(input, weight, target):
        loss, stats = linear_cross_entropy(input, weight, target, reduction=reduction, return_stats=("entropy",))
        return loss.sum(), stats.entropy

    input, weight = torch.randn(12, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    target = torch.randint(40, (12,))
    target[3] = -100
    compiled = torch.compile(loss_and_entropy, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(input, weight, target), loss_and_entropy(input, weight, target), strict=True):
        torch.testing.assert_close(got, want)
    got = gradients(compiled(input, weight, target)[0], [input, weight])
    want = gradients(loss_and_entropy(input, weight, target)[0], [input, weight])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_module_is_the_function(problem):
    input, weight, bias, target = problem
    module = CutCrossEntropyLoss(reduction="sum", z_loss=1e-3, softcap=5.0, return_stats=("argmax",))
    assert not list(module.parameters())
    loss, stats = module(input, weight, target, bias)
    expected = linear_cross_entropy(input, weight, target, linear_bias=bias, reduction="sum", z_loss=1e-3, softcap=5.0)
    assert torch.equal(loss, expected)
    assert isinstance(stats, HeadStats)
    assert "softcap=5.0" in repr(module)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.tensor([[60] * 9] * 4)}, "holds 60, but the vocabulary has 57"),
        ({"target": torch.tensor([[-7] * 9] * 4)}, "holds -7"),
        ({"target": torch.zeros(4, 9)}, "must be int64"),
        ({"target": torch.zeros(4, 8, dtype=torch.int64)}, r"must be input.shape\[:-1\] = \(4, 9\)"),
        ({"linear_weight": torch.zeros(57, 11)}, "do not fit"),
        ({"linear_weight": torch.zeros(0, 12)}, "has no rows"),
        ({"linear_weight": torch.zeros(57, 12).bfloat16()}, "Cast one, or use torch.autocast"),
        ({"linear_bias": torch.zeros(12)}, "must be .V."),
        ({"reduction": "avg"}, "'mean', 'sum' or 'none'"),
        ({"label_smoothing": 1.5}, "must be in .0, 1."),
        ({"softcap": -1.0}, "must be positive"),
        ({"temperature": 0.0}, "must be positive"),
        ({"temperature": torch.ones(3)}, "one value a row"),
        ({"temperature": torch.ones((), requires_grad=True)}, "detach"),
        ({"num_items": 3, "reduction": "sum"}, "does nothing"),
        ({"return_stats": ("perplexity",)}, "there are logprob, entropy"),
        ({"memory_budget_mib": 0}, "must be positive"),
        ({"impl": "cuda"}, "'auto', 'triton' or 'torch'"),
    ],
)
def test_errors_say_what_to_do(change, message):
    arguments = {"input": torch.randn(4, 9, 12), "linear_weight": torch.randn(57, 12)}
    arguments["target"] = torch.zeros(4, 9, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(arguments | change))


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a GPU"):
        linear_cross_entropy(torch.randn(2, 4), torch.randn(5, 4), torch.tensor([0, 1]), impl="triton")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_precision_is_within_budget(reduction):
    """Through the public function, against eager torch in the same dtype."""
    input, weight = torch.randn(200, 64).bfloat16(), (torch.randn(1000, 64) / 8).bfloat16()
    target = torch.randint(1000, (200,))

    def run(loss_of, dtype):
        leaves = [input.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        loss = loss_of(*leaves).mean()
        return [loss, *gradients(loss, leaves)]

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
import sys, torch
from litropy.losses import linear_cross_entropy
dtype, reduction = getattr(torch, sys.argv[1]), sys.argv[2]
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024
def step(N, D, V):
    h, w = torch.randn(N, D, dtype=dtype, requires_grad=True), torch.randn(V, D, dtype=dtype, requires_grad=True)
    y = torch.randint(V, (N,))
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    linear_cross_entropy(h, w, y, reduction=reduction, return_stats=("entropy",))[0].mean().backward()
    return status("VmHWM") - before - (h.grad.nbytes + w.grad.nbytes) / 2**20
step(64, 64, 512)
print(step(2048, 128, 32768))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_beyond_the_gradients(dtype, reduction):
    """At most 64 MiB where stored logits would take 256 (128 in half precision) and their gradient as much again."""
    done = subprocess.run([sys.executable, "-c", MEMORY, dtype, reduction], capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 64
