"""Mistakes that fused cross-entropies are known for, one test each."""

import math

import pytest
import torch
import torch.nn.functional as F
from linear_head_problems import IMPLS

from litropy.losses import linear_cross_entropy, linear_head_stats
from litropy.testing import assert_within_budget


def tensors(N=40, D=12, V=57, dtype=torch.float32, device="cpu"):
    input = torch.randn(N, D, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, device=device) / 3).to(dtype).requires_grad_()
    return input, weight, torch.randint(V, (N,), device=device)


def three_ways(input, weight, target, ours, stored):
    """Loss and gradients of ours, of the eager twin, and in float64, held to the budget."""
    results = []
    for loss_of, dtype in ((ours, None), (stored, None), (stored, torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (input, weight)]
        loss = loss_of(*leaves, target)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for name, got, twin, truth in zip(("loss", "input", "weight"), *results, strict=True):
        assert_within_budget(name, got, twin, truth)
    return results[0]


def stored_loss(input, weight, target, **options):
    z = F.linear(input, weight)
    return F.cross_entropy(z if z.dtype == torch.float64 else z.float(), target, **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_bias_counts_once_however_wide_the_head(impl, device):
    """And not once for each block of the width."""
    input, weight = torch.zeros(3, 700, device=device), torch.randn(20, 700, device=device)
    bias, target = torch.randn(20, device=device), torch.tensor([3, 0, 19], device=device)
    loss = linear_cross_entropy(input, weight, target, linear_bias=bias, reduction="none", impl=impl)
    torch.testing.assert_close(loss, -bias.log_softmax(0)[target])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocabulary", [63, 65, 127, 129, 513])
def test_columns_beyond_the_vocabulary_do_not_count(vocabulary, impl, device):
    """A padded column's logit is 0, which would be everything beside logits of -60."""
    input, weight = torch.ones(5, 4, device=device), torch.full((vocabulary, 4), -15.0, device=device)
    target = torch.full((5,), vocabulary - 1, device=device)
    stats = linear_head_stats(input, weight, target, stats=("lse", "logprob", "entropy"), impl=impl)
    torch.testing.assert_close(stats.lse, torch.full((5,), math.log(vocabulary) - 60, device=device))
    torch.testing.assert_close(stats.entropy, -stats.logprob)
    torch.testing.assert_close(stats.entropy, torch.full((5,), math.log(vocabulary), device=device))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_small_loss_at_a_large_offset_keeps_its_digits(offset, impl, device):
    """lse - z would have the digits of the offset: 1e-3 steps at 1e4."""
    z = torch.tensor([[9.0, 1.0, 2.0, 0.5]], device=device)
    bias = (z[0] + offset).contiguous()
    input, weight = torch.zeros(1, 2, device=device), torch.zeros(4, 2, device=device)
    loss = linear_cross_entropy(input, weight, torch.tensor([0], device=device), linear_bias=bias, impl=impl)
    exact = F.cross_entropy(bias.double()[None], torch.tensor([0], device=device))
    assert 1e-4 < exact < 2e-3
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_loss_near_zero_is_not_negative_and_not_rounded_away(impl, device):
    bias = torch.tensor([20.0, 0.0, 0.0], device=device)
    input, weight = torch.zeros(1, 2, device=device), torch.zeros(3, 2, device=device)
    leaf = bias.requires_grad_()
    loss = linear_cross_entropy(input, weight, torch.tensor([0], device=device), linear_bias=leaf, impl=impl)
    assert 0 <= loss < 1e-8
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(gradient[1:], torch.full((2,), math.exp(-20), device=device), rtol=1e-4, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_z_loss_of_zero_adds_nothing(impl, device):
    input, weight, target = tensors(device=device)
    plain, zero = (linear_cross_entropy(input, weight, target, impl=impl, **x) for x in ({}, {"z_loss": 0.0}))
    assert torch.equal(plain, zero)
    torch.testing.assert_close(plain, F.cross_entropy(F.linear(input, weight), target))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_weight_gradient_over_many_rows_does_not_stall(reduction, impl, device):
    """All rows pull the same way; summed up in bfloat16 the gradient stops growing after a few hundred."""
    input, weight, _ = tensors(N=1500, D=4, V=9, dtype=torch.bfloat16, device=device)
    input = input.detach().abs()
    target = torch.zeros(1500, dtype=torch.int64, device=device)
    three_ways(
        input, weight, target,
        lambda h, w, y: linear_cross_entropy(h, w, y, reduction=reduction, memory_budget_mib=0.002, impl=impl).sum(),
        lambda h, w, y: stored_loss(h, w, y, reduction=reduction).sum(),
    )  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
def test_every_token_has_its_own_upstream_gradient(impl, device):
    """Of reduction="none": not their mean, and not the first one's."""
    input, weight, target = tensors(device=device)
    g = torch.randn(40, device=device)
    three_ways(
        input, weight, target,
        lambda h, w, y: (linear_cross_entropy(h, w, y, reduction="none", impl=impl) * g).sum(),
        lambda h, w, y: (stored_loss(h, w, y, reduction="none") * g).sum(),
    )  # fmt: skip


def test_micro_batches_with_num_items_add_up_to_the_whole_batch():
    """However many tokens each of them has; the factor is applied once."""
    input, weight, target = tensors()
    target[3:25] = -100
    items = (target >= 0).sum()
    whole = linear_cross_entropy(input, weight, target)
    parts = [slice(0, 4), slice(4, 20), slice(20, 40)]
    for num_items in (items, int(items), float(items), items.float()[None]):
        losses = [linear_cross_entropy(input[x], weight, target[x], num_items=num_items) for x in parts]
        torch.testing.assert_close(sum(losses), whole)
    for a, b in zip(*(torch.autograd.grad(x, [input, weight]) for x in (sum(losses), whole)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_mean_is_over_tokens_that_are_not_ignored():
    input, weight, target = tensors()
    target[::2] = -100
    expected = linear_cross_entropy(input[1::2], weight, target[1::2])
    torch.testing.assert_close(linear_cross_entropy(input, weight, target), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compiled_losses_ignore_whichever_rows_are_ignored(reduction):
    """Also those of the next batch, whose number differs, without compiling anew and without breaking the graph."""
    compilations = []

    def backend(graph, _):
        compilations.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(input, weight, target):
        return linear_cross_entropy(input, weight, target, reduction=reduction)

    for ignored in (0, 13, 39, 40):
        input, weight, target = tensors()
        target[:ignored] = -100
        results = []
        for loss_of in (compiled, lambda h, w, y: linear_cross_entropy(h, w, y, reduction=reduction)):
            loss = loss_of(input, weight, target)
            results.append([loss, *torch.autograd.grad(loss.sum(), [input, weight])])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert len(compilations) == 1


def test_compiled_losses_take_batches_of_any_size():
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="eager", dynamic=True)
    for N in (40, 7, 64):
        input, weight, target = tensors(N=N)
        torch.testing.assert_close(compiled(input, weight, target), linear_cross_entropy(input, weight, target))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["fast", "lean"])
def test_the_same_bits_every_time(mode, impl, device):
    input, weight, target = tensors(N=130 if impl == "torch" else 40, V=300, dtype=torch.bfloat16, device=device)
    runs = []
    for _ in range(2):
        loss, stats = linear_cross_entropy(
            input, weight, target, mode=mode, memory_budget_mib=0.1, return_stats=("entropy",), impl=impl
        )
        runs.append([loss, stats.entropy, *torch.autograd.grad(loss, [input, weight])])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("start", [1, 2, 3])
def test_targets_may_begin_anywhere_in_memory(start, impl, device):
    """A shifted view of the ids is not aligned to 16 bytes, and neither are hidden states of an odd width."""
    input, weight, _ = tensors(N=20, D=7, dtype=torch.bfloat16, device=device)
    ids = torch.randint(57, (24,), device=device)
    loss = linear_cross_entropy(input, weight, ids[start : start + 20], impl=impl)
    assert torch.equal(loss, linear_cross_entropy(input, weight, ids[start : start + 20].clone(), impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_row_offsets_beyond_31_bits(impl, device):
    """Rows of the head that lie 2^30 elements apart, in memory of which only the rows are ever touched."""
    storage = torch.empty(2 * 2**30 + 2**10, dtype=torch.bfloat16, device=device)
    weight = storage.as_strided((3, 16), (2**30, 1))
    weight.copy_(torch.randn(3, 16, device=device))
    input, target = torch.randn(4, 16, device=device).bfloat16(), torch.tensor([2, 0, 1, 2], device=device)
    near = weight.contiguous()
    results = []
    for head in (weight, near):
        leaves = [input.detach().requires_grad_(), head.detach().requires_grad_()]
        loss = linear_cross_entropy(*leaves, target, reduction="none", impl=impl)
        stats = linear_head_stats(*leaves, target, stats=("rank", "nucleus_entropy"), top_p=0.5, impl=impl)
        (gradient,) = torch.autograd.grad(loss.sum() + stats.nucleus_entropy.sum(), leaves[0])
        results.append([loss, stats.rank, stats.nucleus_entropy, gradient])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(results[0][0], stored_loss(input, near, target, reduction="none"), rtol=1e-2, atol=1e-2)


def test_a_vocabulary_of_hundreds_of_thousands():
    """More columns than tiles, blocks or 16-bit counters may hold; float32 sums keep their digits."""
    input, weight = torch.randn(6, 4), torch.randn(300_001, 4)
    target = torch.tensor([0, 300_000, 65_535, 65_536, 131_072, 262_144])
    three_ways(
        input, weight, target, lambda h, w, y: linear_cross_entropy(h, w, y), lambda h, w, y: stored_loss(h, w, y)
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_an_adapter_of_the_head_is_not_left_out(impl, device):
    """LoRA on the output head: its logits and its gradients, with the head itself frozen."""
    input, weight, target = tensors(device=device)
    A, B = torch.randn(3, 12, device=device), torch.randn(57, 3, device=device)
    leaves = [x.requires_grad_() for x in (A, B)]
    frozen = weight.detach()
    loss = linear_cross_entropy(input.detach(), frozen, target, low_rank=(input.detach() @ A.t(), B), impl=impl)
    expected = F.cross_entropy(F.linear(input.detach(), frozen + B @ A), target)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{"z_loss": 1e-3}, {"label_smoothing": 0.1}, {"weight": True}, {"bias": True}])
def test_skipping_leaves_the_other_terms_of_the_loss_alone(options, impl, device):
    """Rows that are sure of their token still have a z-loss, a share for the whole vocabulary, weights and a bias."""
    V, N = 1600, 24
    target = torch.randint(V, (N,), device=device) % 500
    weight = 0.1 * torch.randn(V, N, device=device)
    weight[target] += 30 * torch.eye(N, device=device)
    input = torch.eye(N, device=device)
    options = dict(options)
    bias = 0.1 * torch.randn(V, device=device) if options.pop("bias", False) else None
    if options.pop("weight", False):
        options["weight"] = torch.rand(V, device=device)
    results = []
    for skip_tol in (1e-3, 0.0):
        leaves = [x.detach().requires_grad_() for x in (input, weight, *(() if bias is None else (bias,)))]
        loss, stats = linear_cross_entropy(
            *leaves[:2], target, linear_bias=None if bias is None else leaves[2], reduction="sum", mode="lean",
            skip_tol=skip_tol, return_stats=("lse", "skipped_mass") if skip_tol else ("lse",), impl=impl, **options,
        )  # fmt: skip
        results.append((loss, stats, torch.autograd.grad(loss, leaves)))
    (loss, stats, got), (exact_loss, _, exact) = results
    torch.testing.assert_close(loss, exact_loss)
    assert stats.skipped_mass.max() <= 1e-3
    reach = 1 + 2 * options.get("z_loss", 0.0) * stats.lse.abs().max()
    bound = reach * stats.skipped_mass.max() * weight.norm(dim=1).max() + 1e-5
    assert (got[0] - exact[0]).norm(dim=1).max() <= bound
    for a, b in zip(got[1:], exact[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=float(reach * stats.skipped_mass.sum()) + 1e-5)
    if "z_loss" in options:  # without it there would be next to nothing
        assert exact[0].norm() > 100 * bound


def test_no_tolerance_is_no_skipping_to_the_bit():
    input, weight, target = tensors(N=60, V=1300)
    results = []
    for options in ({}, {"skip_tol": 0.0}):
        loss = linear_cross_entropy(input, weight, target, mode="lean", **options)
        results.append([loss, *torch.autograd.grad(loss, [input, weight])])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
