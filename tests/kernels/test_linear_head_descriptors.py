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


def test_any_number_of_programs_gives_the_same_bits(monkeypatch, device):
    """Each goes through several tiles, no more of them than processors, unless tiles are left out."""
    kernel, programs = linear_head_triton.gradient_kernel, []

    class Spy:
        def __getitem__(self, grid):
            programs.append(grid)
            return kernel[grid]

    monkeypatch.setattr(linear_head_triton, "gradient_kernel", Spy())
    monkeypatch.setattr(linear_head_triton, "has_tma", lambda _: True)
    monkeypatch.setattr(linear_head_triton, "vocabulary_shares", lambda *_: 2)
    leaves = [torch.randn(*shape, device=device).bfloat16().requires_grad_() for shape in ((300, 16), (600, 16))]
    target = torch.randint(600, (300,), device=device)
    target[128:256] = -100

    def run(processors, **options):
        monkeypatch.setattr(linear_head_triton, "_processors", lambda _: processors)
        loss = linear_cross_entropy(*leaves, target, mode="lean", impl="triton", **options)
        return torch.autograd.grad(loss, leaves)

    expected = run(1000)
    for processors in (1, 4, 7):
        assert all(torch.equal(a, b) for a, b in zip(run(processors), expected, strict=True))
    run(4, skip_tol=1e-3)
    assert programs == [(15,), (1,), (4,), (7,), (15,)]


@pytest.mark.parametrize(
    ("row_blocks", "tiles", "shares"),
    [(64, 1187, 4), (128, 1187, 2), (8, 1187, 33), (1, 3, 3), (0, 5, 1), (5, 1, 1), (1000, 1187, 1)],
)
def test_shares_of_the_vocabulary_leave_no_processor_idle(row_blocks, tiles, shares):
    found = linear_head_triton.vocabulary_shares(row_blocks, tiles, places=264)
    assert found == shares
    if row_blocks * tiles > 10 * 264:
        time = -(-row_blocks * found // 264) * -(-tiles // found)
        assert time * 264 <= 1.06 * row_blocks * tiles
