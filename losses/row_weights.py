"""What each row counts in a reduced loss."""

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Reduction", "check_reduction", "row_weights"]

Reduction = Literal["mean", "sum", "none"]


def check_reduction(reduction: str, num_items: float | Tensor | None) -> None:
    """Raise ValueError if the reduction is none, or what replaces the mean's denominator does not fit."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"`reduction` is {reduction!r}; choose 'mean', 'sum' or 'none'.")
    if num_items is not None and reduction != "mean":
        raise ValueError(
            f"`num_items` replaces the denominator of the mean; it does nothing with reduction={reduction!r}."
        )
    if isinstance(num_items, Tensor) and (num_items.requires_grad or num_items.numel() != 1):
        raise ValueError("`num_items` must be a number or a tensor of one element that requires no gradient.")


def row_weights(
    labels: Tensor,
    class_weight: Tensor | None,
    reduction: Reduction,
    num_items: float | Tensor | None,
    token_weight: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Weight of each row in the reduced loss, [N]; the mean over no tokens is 0, not NaN."""
    valid = (labels >= 0).to(dtype)
    weights = valid
    if token_weight is not None:
        if token_weight.requires_grad:
            raise ValueError("`token_weight` requires a gradient, but none flows to it; pass token_weight.detach().")
        if token_weight.numel() != labels.numel():
            raise ValueError(
                f"`token_weight` is {tuple(token_weight.shape)}; it must be shaped like `target`,"
                f" {labels.numel()} tokens."
            )
        weights = token_weight.reshape(-1).to(dtype).masked_fill(labels < 0, 0.0)
    if reduction != "mean":
        return weights
    if num_items is None:
        total = (valid if class_weight is None else valid * class_weight).sum()
    else:
        total = torch.as_tensor(num_items, dtype=dtype, device=labels.device).reshape(())
    # not 0 / 0 at ignored tokens: a step without any token to learn from has num_items = 0
    return (weights / total).masked_fill(labels < 0, 0.0)
