"""Quantiles of each response's tokens."""

import torch
from torch import Tensor

__all__ = ["row_quantile"]


def row_quantile(values: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """The quantile of each row's values in ``mask``, interpolated linearly between ranks, without gradient.

    Args:
        values: [R, T].
        mask: bool [R, T].
        quantile: from 0 to 1.

    Returns:
        [R]; 0 for a row without any.

    Example::

        >>> row_quantile(torch.tensor([[3.0, 1.0, 2.0, 9.0]]), torch.tensor([[True, True, True, False]]), 0.75)
        tensor([2.5000])
    """
    if not values.shape[1]:
        return values.new_zeros(len(values))
    ordered = torch.where(mask, values.detach(), torch.inf).sort(-1).values
    count = mask.sum(-1, keepdim=True)
    place = (count - 1).clamp(min=0).double() * quantile
    low = place.floor().long()
    high = torch.minimum(low + 1, (count - 1).clamp(min=0))
    found = torch.lerp(ordered.gather(1, low), ordered.gather(1, high), (place - low).to(values.dtype))
    return torch.where(count > 0, found, 0)[:, 0]
