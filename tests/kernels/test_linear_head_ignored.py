"""Blocks of rows that are ignored altogether: the kernels leave their products out."""

import pytest
import torch

from litropy.losses import linear_cross_entropy


@pytest.mark.parametrize("skip_tol", [0.0, 1e-3])
def test_ignored_blocks_change_nothing(skip_tol, device):
    h, w = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((150, 24), (140, 24)))
    target = torch.randint(140, (150,), device=device)
    target[:130] = -100  # two whole blocks of 64 rows and a part of the third

    def run(rows, impl):
        options = {"label_smoothing": 0.1, "skip_tol": skip_tol, "return_stats": ("entropy",), "impl": impl}
        loss, stats = linear_cross_entropy(h[rows], w, target[rows], **options)
        return [loss.detach(), stats.entropy[-20:], *torch.autograd.grad(loss, [h, w])]

    for got, expected in zip(run(slice(None), "triton"), run(slice(130, None), "torch"), strict=True):
        torch.testing.assert_close(got, expected)
