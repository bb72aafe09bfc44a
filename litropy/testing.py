"""Public test helpers: the error budget that every kernel is held to, and tiny models made from a config."""

import torch
from torch import Tensor

__all__ = ["assert_within_budget"]


def assert_within_budget(name: str, got: Tensor, twin: Tensor, truth: Tensor, slack: float = 1e-6) -> None:
    """Check that a result is as exact as its dtype allows.

    The budget is ``2 * max|twin - truth| + eps(got.dtype) * max|truth| + slack``: at most twice the error of the
    same-dtype eager computation, plus one rounding of the largest magnitude.

    Args:
        name: what is compared, for the failure's message.
        got: the result under test.
        twin: the same computation done by eager PyTorch in the dtype under test.
        truth: the same computation done in float64.
        slack: absolute term for results whose true value is zero.

    Raises:
        AssertionError: if the result is outside the budget, is not finite where the truth is, or has another shape.

    Example::

        >>> x = torch.tensor([1.0, 2.0])
        >>> assert_within_budget("x", x, x, x.double())
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    if not truth.numel():
        return
    assert torch.isfinite(got).all(), f"{name}: {int((~torch.isfinite(got)).sum())} values are not finite"
    error = (got.double() - truth.double()).abs()
    budget = 2 * (twin.double() - truth.double()).abs().max()
    budget = budget + torch.finfo(got.dtype).eps * truth.double().abs().max() + slack
    worst = int(error.argmax())
    assert error.max() <= budget, (
        f"{name}: error {error.max():.3e} is over the budget {budget:.3e} at flat index {worst}:"
        f" got {got.flatten()[worst]:.9g}, eager {twin.flatten()[worst]:.9g}, float64 {truth.flatten()[worst]:.9g}"
    )
