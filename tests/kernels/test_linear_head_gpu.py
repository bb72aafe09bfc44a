"""What only a GPU can show: realistic sizes, equal bits, memory, offsets beyond 2^31, Inductor and CUDA graphs."""

import pytest
import torch

from litropy.kernels.linear_head_reference import linear_head_reference
from litropy.losses import linear_cross_entropy, linear_head_stats
from litropy.testing import assert_within_budget

pytestmark = pytest.mark.gpu


def problem(N, D, V, dtype=torch.bfloat16):
    input = torch.randn(N, D, device="cuda", dtype=dtype, requires_grad=True)
    weight = (torch.randn(V, D, device="cuda", dtype=dtype) / D**0.5).requires_grad_()
    return input, weight, torch.randint(V, (N,), device="cuda")


def run(input, weight, target, **options):
    loss = linear_cross_entropy(input, weight, target, **options)
    return [loss, *torch.autograd.grad(loss, [input, weight])]


WAYS = {
    "auto": {},
    "lean": {"mode": "lean"},
    "fast": {"mode": "fast", "memory_budget_mib": 256},
    "in PyTorch": {"mode": "lean", "impl": "torch"},
}
SKIPPING = {"skip_tol": 1e-3}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_realistic_sizes_stay_within_budget(options):
    input, weight, target = problem(1024, 896, 50257)
    ours = run(input, weight, target, **options)

    def stored(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (input, weight)]
        z = leaves[0] @ leaves[1].t()
        loss = torch.nn.functional.cross_entropy(z if dtype == torch.float64 else z.float(), target)
        return [loss, *torch.autograd.grad(loss, leaves)]

    twins, truths = stored(torch.bfloat16), stored(torch.float64)
    for name, got, twin, truth in zip(("loss", "dh", "dw"), ours, twins, truths, strict=True):
        assert_within_budget(name, got, twin, truth)


@pytest.mark.parametrize("options", [*WAYS.values(), SKIPPING], ids=[*WAYS, "skipping"])
def test_same_bits_twice(options):
    tensors = problem(3000, 512, 40000)
    for first, second in zip(run(*tensors, **options), run(*tensors, **options), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("options", [WAYS["lean"], WAYS["fast"], SKIPPING], ids=["lean", "fast", "skipping"])
def test_nothing_waits_for_the_device(options):
    """Neither forward nor backward, with ignored rows, weights, smoothing and a number of items on the device."""
    input, weight, target = problem(256, 128, 5000)
    target[::3] = -100
    options = options | {
        "weight": torch.rand(5000, device="cuda"),
        "token_weight": torch.rand(256, device="cuda"),
        "num_items": (target >= 0).sum(),
        "label_smoothing": 0.1,
        "z_loss": 1e-4,
    }
    run(input, weight, target, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(input, weight, target, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_skipping_saves_work_and_stays_within_its_bound():
    """Rows that are sure of their token: few tiles survive, and gradients are off by what is stated."""
    N, D, V = 512, 512, 50257
    target = torch.randperm(4096, device="cuda")[:N]
    input = torch.eye(N, D, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = 0.02 * torch.randn(V, D, device="cuda")
    weight[target, torch.arange(N, device="cuda")] += 25
    weight = weight.bfloat16().requires_grad_()
    options = {"reduction": "sum", "mode": "lean", "return_stats": ("skipped_mass", "surviving_share")}
    loss, stats = linear_cross_entropy(input, weight, target, **(options | SKIPPING))
    skipped = torch.autograd.grad(loss, [input, weight])
    exact_loss = linear_cross_entropy(input, weight, target, reduction="sum", mode="lean")
    exact = torch.autograd.grad(exact_loss, [input, weight])
    assert stats.skipped_mass.max() <= 1e-3
    assert stats.surviving_share.mean() < 0.2
    torch.testing.assert_close(loss, exact_loss, rtol=1e-2, atol=1e-3)
    bound = stats.skipped_mass * weight.detach().float().norm(dim=1).max() + 0.02 * exact[0].float().norm(dim=1)
    assert ((skipped[0].float() - exact[0].float()).norm(dim=1) <= bound + 1e-3).all()
    torch.testing.assert_close(skipped[1], exact[1], rtol=1e-2, atol=float(stats.skipped_mass.sum()) + 1e-3)


def test_ranks_and_nuclei_of_realistic_sizes():
    """Small integers, whose logits are exact in bfloat16, so that nothing depends on rounding but the mass."""
    input = torch.randint(-1, 2, (256, 24), device="cuda").bfloat16()
    weight = torch.randint(-1, 2, (50257, 24), device="cuda").bfloat16()
    target = torch.randint(50257, (256,), device="cuda")
    names = ("rank", "nucleus_entropy", "topk_entropy", "topk_mass", "argmax")
    for nucleus in ("closed", "open"):
        stats = linear_head_stats(
            input, weight, target, temperature=2.0, stats=names, top_p=0.9, top_k=20, nucleus=nucleus
        )
        truth = linear_head_reference(
            input.double(), weight.double(), None, target, temperature=2.0, top_p=0.9, top_k=20,
            open_nucleus=nucleus == "open",
        )  # fmt: skip
        assert torch.equal(stats.rank, truth["rank"])
        assert torch.equal(stats.argmax, truth["argmax"])
        for name in ("nucleus_entropy", "topk_entropy", "topk_mass"):
            torch.testing.assert_close(getattr(stats, name).double(), truth[name], rtol=1e-4, atol=1e-4)


def test_memory_beyond_the_gradients():
    N, D, V = 4096, 1024, 128256
    tensors = problem(N, D, V)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run(*tensors)
    gradients = sum(x.nbytes for x in results[1:])
    extra = torch.cuda.max_memory_allocated() - before - gradients
    # the strip of logit gradients, dInput in float32, and the statistics; stored logits would take 1002 MiB
    assert extra <= (64 << 20) + 4 * N * D + (8 << 20)


def test_offsets_beyond_int32():
    """N V and V D both exceed 2^31, and rows at the far end are right."""
    N, D, V = 16, 1024, 2_200_000
    input, weight, target = problem(N, D, V)
    target[:] = V - 1
    stats = linear_head_stats(input, weight, target, stats=("logprob",))
    z = input.double() @ weight[-1].double()
    lse = torch.stack([(weight.detach()[i : i + 100_000].double() @ input.detach().double().t()).logsumexp(0)
                       for i in range(0, V, 100_000)]).logsumexp(0)  # fmt: skip
    torch.testing.assert_close(stats.logprob.double(), z - lse, rtol=1e-3, atol=1e-3)


def test_inductor_compiles_the_loss_whole():
    tensors = problem(512, 128, 5000)
    compiled = torch.compile(lambda h, w, y: linear_cross_entropy(h * 2, w, y), fullgraph=True)
    loss = compiled(*tensors)
    got = [loss, *torch.autograd.grad(loss, tensors[:2])]
    expected = linear_cross_entropy(tensors[0] * 2, *tensors[1:])
    expected = [expected, *torch.autograd.grad(expected, tensors[:2])]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def test_loss_can_be_captured_in_a_cuda_graph():
    tensors = problem(512, 128, 5000)
    expected = run(*tensors)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(*tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*tensors)
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


def test_a_target_out_of_range_makes_the_loss_nan_without_waiting():
    input, weight, target = problem(64, 32, 100)
    target[5] = 100
    assert torch.isnan(linear_cross_entropy(input, weight, target))
    losses = linear_cross_entropy(input, weight, target, reduction="none")
    assert torch.isnan(losses[5])
    assert torch.isfinite(losses[:5]).all()
