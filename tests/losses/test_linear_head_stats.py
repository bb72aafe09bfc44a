"""Row statistics through the public function: shapes, names, gradients, which rows count."""

import math

import pytest
import torch
from linear_head_problems import IMPLS

from litropy.kernels.linear_head_reference import linear_head_reference
from litropy.losses import HeadStats, linear_cross_entropy, linear_head_stats

REAL = (
    "logprob", "entropy", "lse", "varentropy", "collision", "max_logprob", "nucleus_entropy", "entropy_drift",
    "topk_entropy", "topk_mass",
)  # fmt: skip
WHOLE = ("argmax", "rank")
DIFFERENTIABLE = ("logprob", "entropy", "lse", "varentropy", "nucleus_entropy")


@pytest.fixture
def problem(device):
    input = torch.randn(4, 9, 12, device=device)
    weight, bias = torch.randn(57, 12, device=device) / 2, torch.randn(57, device=device)
    target = torch.randint(57, (4, 9), device=device)
    target[0, :4] = -1
    return input, weight, bias, target


def reference(input, weight, bias, target, **options):
    target = None if target is None else target.flatten()
    stats = linear_head_reference(input.reshape(-1, 12), weight, bias, target, **options)
    return {name: value.view(input.shape[:-1]) for name, value in stats.items()}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("nucleus", ["closed", "open"])
def test_every_statistic_and_gradient(problem, impl, nucleus):
    input, weight, bias, target = problem
    leaves = [x.detach().requires_grad_() for x in (input, weight, bias)]
    options = {"softcap": 9.0, "temperature": 0.5 + torch.rand(4, 9, device=input.device), "top_p": 0.7, "top_k": 6}
    stats = linear_head_stats(
        *leaves[:2], target, linear_bias=leaves[2], stats=(*REAL, *WHOLE), nucleus=nucleus, impl=impl, **options
    )
    exact = [x.detach().double().requires_grad_() for x in (input, weight, bias)]
    options |= {"temperature": options["temperature"].flatten(), "open_nucleus": nucleus == "open"}
    truth = reference(*exact, target, **options)
    for name in (*REAL, *WHOLE):
        value = getattr(stats, name)
        assert value.shape == target.shape
        assert value.dtype == (torch.int64 if name in WHOLE else torch.float32)
        assert value.requires_grad == (name in DIFFERENTIABLE), name
        torch.testing.assert_close(value.double(), truth[name].double(), rtol=1e-4, atol=1e-5, msg=name)
    for name in DIFFERENTIABLE:
        got = torch.autograd.grad(getattr(stats, name).square().sum(), leaves, retain_graph=True)
        expected = torch.autograd.grad(truth[name].square().sum(), exact, retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_row_without_a_target(problem, impl):
    input, weight, bias, _ = problem
    names = [name for name in (*REAL, *WHOLE) if name not in ("logprob", "rank")]
    options = {"top_p": 0.7, "top_k": 6}
    stats = linear_head_stats(input, weight, linear_bias=bias, stats=names, impl=impl, **options)
    truth = reference(input.double(), weight.double(), bias.double(), None, **options)
    for name in names:
        torch.testing.assert_close(getattr(stats, name).double(), truth[name].double(), rtol=1e-4, atol=1e-5, msg=name)
    assert (stats.entropy > 0).all()


def test_what_is_not_asked_for_is_none(problem):
    stats = linear_head_stats(*problem[:2], stats=("entropy",))
    assert {name for name, value in vars(stats).items() if value is not None} == {"entropy"}
    assert linear_head_stats(*problem[:2], stats=()) == HeadStats()


def test_any_negative_target_is_ignored(problem):
    input, weight, _, target = problem
    names = ("logprob", "entropy", "varentropy", "max_logprob", "argmax", "rank")
    one, other = (
        linear_head_stats(input, weight, target.where(target >= 0, value), stats=names) for value in (-1, -100)
    )
    for name in names:
        assert torch.equal(getattr(one, name), getattr(other, name))
        assert not getattr(one, name)[target < 0].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3)])
def test_nothing_to_measure(impl, shape, device):
    input = torch.randn(*shape, 8, device=device, requires_grad=True)
    weight = torch.randn(20, 8, device=device, requires_grad=True)
    target = torch.full(shape, -1, device=device)
    stats = linear_head_stats(input, weight, target, stats=(*REAL, *WHOLE), top_p=0.5, top_k=2, impl=impl)
    for name in (*REAL, *WHOLE):
        assert torch.equal(getattr(stats, name), torch.zeros_like(getattr(stats, name)))
        assert getattr(stats, name).shape == shape
    sum(getattr(stats, name).sum() for name in DIFFERENTIABLE).backward()
    assert torch.equal(input.grad, torch.zeros_like(input))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_low_rank_is_the_merged_head(problem):
    """An adapter u B^T on the logits is the head W + B A for u = h A^T."""
    input, weight, bias, target = problem
    A, B = torch.randn(3, 12), torch.randn(57, 3)
    names = ("logprob", "entropy", "varentropy", "rank")
    apart = linear_head_stats(input, weight, target, linear_bias=bias, low_rank=(input @ A.t(), B), stats=names)
    merged = linear_head_stats(input, weight + B @ A, target, linear_bias=bias, stats=names)
    for name in names:
        torch.testing.assert_close(getattr(apart, name), getattr(merged, name), rtol=1e-4, atol=1e-4)


def test_more_top_k_than_entries(problem):
    input = problem[0]
    stats = linear_head_stats(input, torch.randn(5, 12), stats=("topk_entropy", "topk_mass", "entropy"), top_k=64)
    torch.testing.assert_close(stats.topk_mass, torch.ones(4, 9))
    torch.testing.assert_close(stats.topk_entropy, stats.entropy, rtol=1e-5, atol=1e-6)


def test_statistics_beside_a_loss_are_the_same(problem):
    input, weight, bias, target = problem
    names = ("logprob", "entropy", "lse", "varentropy", "collision", "max_logprob", "argmax", "entropy_drift", "rank")
    alone = linear_head_stats(input, weight, target, linear_bias=bias, stats=names)
    _, beside = linear_cross_entropy(input, weight, target, linear_bias=bias, ignore_index=-1, return_stats=names)
    for name in names:
        torch.testing.assert_close(getattr(beside, name), getattr(alone, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_statistics(problem, dtype):
    input, weight, _, target = problem
    stats = linear_head_stats(input.to(dtype), weight.to(dtype), target)
    assert stats.entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_uniform_and_certain_rows():
    """Numbers that one can check in one's head, at a large vocabulary."""
    V = 300_000
    stats = linear_head_stats(
        torch.zeros(2, 4), torch.randn(V, 4), torch.tensor([0, V - 1]), stats=(*REAL, "rank"), top_p=0.5, top_k=10
    )
    for name in ("entropy", "lse", "nucleus_entropy"):
        torch.testing.assert_close(getattr(stats, name), torch.full((2,), math.log(V)), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.topk_mass, torch.full((2,), 10 / V), rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.collision, torch.full((2,), 1 / V), rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.varentropy, torch.zeros(2), rtol=0, atol=1e-5)
    assert not stats.rank.any()
    bias = torch.zeros(V).index_fill(0, torch.tensor([7]), 90.0)
    sure = linear_head_stats(
        torch.zeros(1, 4), torch.randn(V, 4), torch.tensor([9]), linear_bias=bias, stats=(*REAL, *WHOLE), top_p=0.9,
        top_k=2,
    )  # fmt: skip
    assert (int(sure.argmax), int(sure.rank), float(sure.collision), float(sure.topk_mass)) == (7, 1, 1.0, 1.0)
    assert max(float(x) for x in (sure.entropy, sure.nucleus_entropy, sure.varentropy, -sure.max_logprob)) < 1e-6
    torch.testing.assert_close(sure.logprob, torch.tensor([-90.0]))


@pytest.mark.parametrize("names", [("entropy", "logprob"), ("rank", "nucleus_entropy", "topk_mass")])
def test_compiles_without_graph_breaks(problem, names):
    input, weight, _, target = problem

    def measure(input, weight, target):
        stats = linear_head_stats(input, weight, target, stats=names, top_p=0.8, top_k=4)
        return tuple(getattr(stats, name) for name in names)

    compiled = torch.compile(measure, fullgraph=True, backend="aot_eager")
    leaf = input.detach().requires_grad_()
    got, expected = compiled(leaf, weight, target), measure(leaf, weight, target)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    differentiable = [i for i, name in enumerate(names) if name in DIFFERENTIABLE]
    for a, b in zip(*([x[i] for i in differentiable] for x in (got, expected)), strict=True):
        torch.testing.assert_close(
            *(torch.autograd.grad(x.sum(), leaf, retain_graph=True)[0] for x in (a, b)), rtol=1e-5, atol=1e-6
        )
