"""Log-probabilities of chosen entries against stored logits."""

import pytest
import torch
import torch.nn.functional as F

from litropy.losses import linear_head_logprobs
from litropy.testing import assert_within_budget


def problem(dtype, device, V=57):
    leaves = [torch.randn(*shape, device=device).to(dtype).requires_grad_() for shape in ((4, 9, 12), (V, 12), (V,))]
    return leaves, torch.randint(V, (4, 9, 5), device=device)


def eager(leaves, ids, softcap, temperature, dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    z = F.linear(*leaves)
    z = z if z.dtype == torch.float64 else z.float()
    z = softcap * torch.tanh(z / softcap) / temperature[..., None].to(z.dtype)
    return leaves, z.log_softmax(-1).gather(-1, ids)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype, impl, device):
    leaves, ids = problem(dtype, device)
    temperature = 0.5 + torch.rand(4, 9, device=device)
    got = linear_head_logprobs(*leaves[:2], ids, linear_bias=leaves[2], softcap=5.0, temperature=temperature, impl=impl)
    cotangent = torch.randn_like(got)
    results = [(got, torch.autograd.grad(got, leaves, cotangent))]
    for other in (dtype, torch.float64):
        others, expected = eager(leaves, ids, 5.0, temperature, other)
        results.append((expected, torch.autograd.grad(expected, others, cotangent.to(expected.dtype))))
    (ours, gradients), (twin, twins), (truth, truths) = results
    assert_within_budget("logprobs", ours, twin, truth)
    for name, a, b, c in zip("hwb", gradients, twins, truths, strict=True):
        assert_within_budget(f"d{name}", a, b, c)


def test_the_same_entry_several_times_in_small_blocks(monkeypatch):
    monkeypatch.setattr("litropy.kernels.selected_logits._GATHERED", 1000)
    leaves, ids = problem(torch.float64, "cpu", V=3)

    def logprobs(h, w, b):
        return linear_head_logprobs(h, w, ids, linear_bias=b)

    torch.testing.assert_close(logprobs(*leaves), F.linear(*leaves).log_softmax(-1).gather(-1, ids))
    assert torch.autograd.gradcheck(logprobs, leaves)


def test_frozen_weight_and_compiled_code():
    leaves, ids = problem(torch.float32, "cpu")
    h, w = leaves[0], leaves[1].detach()
    compiled = torch.compile(lambda h: linear_head_logprobs(h, w, ids), fullgraph=True, backend="aot_eager")
    got, expected = compiled(h), linear_head_logprobs(h, w, ids)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got.sum(), [h]), torch.autograd.grad(expected.sum(), [h]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(4, 9, 2), "int64"),
        (torch.zeros(4, 8, 2, dtype=torch.int64), "of shape"),
        (torch.full((4, 9, 2), 57), "within 0 to 56"),
        (torch.full((4, 9, 2), -1), "within 0 to 56"),
    ],
)
def test_wrong_ids(ids, message):
    with pytest.raises(ValueError, match=message):
        linear_head_logprobs(torch.randn(4, 9, 12), torch.randn(57, 12), ids)


def test_autocast_rounds_no_sum():
    """Only the products are in half precision, as if input and weight had been cast before."""
    h, w = torch.randn(50, 16), torch.randn(700, 16)
    ids = torch.randint(700, (50, 3))
    expected = linear_head_logprobs(h.bfloat16(), w.bfloat16(), ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_head_logprobs(h, w, ids), expected)
