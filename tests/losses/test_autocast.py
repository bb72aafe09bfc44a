"""Under autocast only the products are in half precision: no sum of the loss is rounded."""

import pytest
import torch

from litropy.losses import linear_cross_entropy


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("mode", ["fast", "lean"])
def test_sums_are_not_rounded(mode, impl, device):
    h, w = torch.randn(50, 16, device=device), torch.randn(300, 16, device=device)
    target = torch.randint(300, (50,), device=device)
    options = {
        "weight": torch.rand(300, device=device),
        "label_smoothing": 0.5,
        "z_loss": 0.1,
        "mode": mode,
        "impl": impl,
    }

    def run(h, w):
        h, w = h.requires_grad_(), w.requires_grad_()
        loss = linear_cross_entropy(h, w, target, **options)
        return [loss, *torch.autograd.grad(loss, [h, w])]

    expected = run(h.bfloat16(), w.bfloat16())
    with torch.autocast(device.type, torch.bfloat16):
        got = run(h, w)
    assert torch.equal(got[0], expected[0])
    for a, b in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b.float(), rtol=0.01, atol=1e-5)
