"""The linear head's kernels with operands that come through tensor descriptors, as on Hopper, give the same numbers."""

import pytest
import torch

from litropy.kernels import linear_head_triton
from litropy.losses import linear_cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("D", "described"), [(40, True), (41, False)])
def test_descriptors_change_no_number(monkeypatch, dtype, D, described, device):
    """Where rows are no multiples of 16 bytes, the kernels take pointers."""
    seen = []
    make = linear_head_triton.TensorDescriptor.from_tensor

    class Spy:
        @staticmethod
        def from_tensor(x, block):
            seen.append(tuple(x.shape))
            return make(x, block)

    monkeypatch.setattr(linear_head_triton, "TensorDescriptor", Spy)
    N, V, R = 70, 150, 8
    leaves = [
        torch.randn(*shape, device=device).to(dtype).requires_grad_() for shape in ((N, D), (V, D), (N, R), (V, R))
    ]
    h, w, u, B = leaves
    target = torch.randint(V, (N,), device=device)

    def run(has_tma):
        monkeypatch.setattr(linear_head_triton, "has_tma", lambda _: has_tma)
        loss = linear_cross_entropy(h, w, target, low_rank=(u, B), label_smoothing=0.1, mode="lean", impl="triton")
        return [loss, *torch.autograd.grad(loss, leaves)]

    without = run(False)
    assert not seen
    for got, expected in zip(run(True), without, strict=True):
        torch.testing.assert_close(got, expected)
    assert bool(seen) == described
