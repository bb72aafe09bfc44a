"""What only a GPU can show of attention entropy: realistic sizes, equal bits, memory, far offsets, CUDA graphs."""

import dataclasses

import pytest
import torch

from litropy.kernels.attention_entropy import AttentionStats, attention_entropy
from litropy.kernels.attention_entropy_reference import attention_entropy_reference
from litropy.testing import assert_within_budget

pytestmark = pytest.mark.gpu

FIELDS = [field.name for field in dataclasses.fields(AttentionStats)]


def problem(B, H, heads, Tq, Tk, D, dtype=torch.bfloat16):
    """Queries and keys laid out as attention modules do."""
    q = torch.randn(B, Tq, H, D, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_()
    k = torch.randn(B, Tk, heads, D, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_()
    return q, k


def run(q, k, function=attention_entropy, **options):
    stats = function(q, k, causal=True, **options)
    return stats, torch.autograd.grad((stats.entropy + 0.1 * stats.lse).sum(), [q, k])


@pytest.mark.parametrize("width", [64, 128, 192, 256, 576])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_realistic_sizes_stay_within_budget(dtype, width):
    """Widths of heads and latents in use; every one of them fits the device's shared memory."""
    q, k = problem(2, 8, 2, 700, 1111, width, dtype)
    options = {
        "rows": torch.randint(700, (2, 128), device="cuda"),
        "sinks": torch.randn(8, device="cuda"),
        "softcap": 30.0,
        "key_mask": torch.rand(2, 1111, device="cuda") < 0.9,
        "bias": torch.randn(2, 1, 700, 1111, device="cuda"),
        "alibi_slopes": 2.0 ** -torch.arange(1, 9, device="cuda"),
    }
    ours, gradients = run(q, k, **options)
    twin, twins = run(q, k, attention_entropy_reference, **options)
    exact = [x.detach().double().requires_grad_() for x in (q, k)]
    truth, truths = run(*exact, attention_entropy_reference, **options)
    for name in FIELDS:
        assert_within_budget(name, getattr(ours, name), getattr(twin, name), getattr(truth, name))
    for name, a, b, c in zip(("dq", "dk"), gradients, twins, truths, strict=True):
        assert_within_budget(name, a, b, c)


def test_same_bits_twice():
    """However often a row is repeated: nothing is added in an order that varies."""
    q, k = problem(2, 8, 2, 2048, 2048, 64)
    rows = torch.randint(20, (2, 256), device="cuda")
    (first, first_gradients), (second, second_gradients) = (run(q, k, rows=rows) for _ in range(2))
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in FIELDS)
    assert all(torch.equal(a, b) for a, b in zip(first_gradients, second_gradients, strict=True))


def test_memory_beyond_the_gradients():
    q, k = problem(1, 16, 4, 16384, 16384, 128)
    run(q, k)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, gradients = run(q, k)
    extra = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in gradients)
    # the strip of logit gradients, dq in float32 and in bfloat16, a clean copy of q, sums and statistics of rows; the
    # matrix of attention would take 8192 MiB
    assert extra <= (64 << 20) + (4 + 2 + 2) * q.numel() + (64 << 20)


def test_offsets_beyond_int32():
    """A bias of more than 2^31 numbers, and keys that end beyond as many: the last row is right."""
    T = 50_000
    q, k = problem(1, 1, 1, T, T, 64)
    bias = torch.zeros(1, 1, T, T, device="cuda", dtype=torch.bfloat16)
    bias[0, 0, -1, -1] = 5.0
    rows = torch.tensor([0, T - 1], device="cuda")
    with torch.no_grad():
        stats = attention_entropy(q, k, rows=rows, bias=bias)
        z = (q[:, :, rows].double() @ k.double().transpose(2, 3)) / 8 + bias[:, :, rows].double()
    torch.testing.assert_close(stats.lse.double(), z.logsumexp(-1), rtol=1e-4, atol=1e-4)
    many = torch.randn(1, 1, 2**31 // 64 + 1000, 64, device="cuda", dtype=torch.bfloat16)
    lse = attention_entropy(q.detach(), many, rows=rows).lse
    parts = [
        (q[:, :, rows].float() @ part.float().transpose(2, 3) / 8).logsumexp(-1) for part in many.split(1 << 22, 2)
    ]
    torch.testing.assert_close(lse, torch.stack(parts).logsumexp(0), rtol=1e-4, atol=1e-4)


def test_a_row_out_of_range_is_nan_without_waiting():
    q, k = problem(1, 2, 1, 100, 100, 64)
    stats = attention_entropy(q, k, rows=torch.tensor([5, 100, -1], device="cuda"))
    for name in FIELDS:
        assert getattr(stats, name).isnan().tolist() == [[[False, True, True]] * 2], name


def test_nothing_waits_for_the_device():
    q, k = problem(2, 8, 2, 512, 512, 64)
    options = {"rows": torch.randint(512, (2, 64), device="cuda"), "prefix_length": 3, "window": 100}
    run(q, k, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(q, k, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_inductor_compiles_it_whole():
    q, k = problem(2, 8, 2, 512, 512, 64)
    options = {
        "rows": torch.randint(512, (2, 64), device="cuda"),
        "mask": torch.rand(512, 512, device="cuda")[None, None] < 0.9,
    }

    def measure(q, k, **rest):
        return attention_entropy(q * 2, k, **rest)

    got, gradients = run(q, k, torch.compile(measure, fullgraph=True), **options)
    expected, expected_gradients = run(q, k, measure, **options)
    for name in FIELDS:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-3, atol=1e-4)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_can_be_captured_in_a_cuda_graph():
    q, k = problem(2, 8, 2, 512, 512, 64)
    rows = torch.randint(512, (2, 64), device="cuda")
    expected, _ = run(q, k, rows=rows)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(q, k, rows=rows)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention_entropy(q, k, causal=True, rows=rows)
    graph.replay()
    for name in FIELDS:
        assert torch.equal(getattr(captured, name), getattr(expected, name)), name
