"""Choosing tokens by a number each, so that rounding does not decide."""

import torch
from torch import Tensor

__all__ = ["covariance", "first_tokens", "largest_share", "steady"]

_GRID = 2.0**14


def steady(values: Tensor) -> Tensor:
    """Round to multiples of 2^-14, so that numbers that are equal but for rounding compare as equal.

    Responses of one group often share their first tokens, whose statistics are equal, but are computed in different
    micro-batches.

    Example::

        >>> steady(torch.tensor([0.5, 0.5 + 1e-7])).tolist()
        [0.5, 0.5]
    """
    return (values.detach() * _GRID).round() / _GRID


def largest_share(values: Tensor, mask: Tensor, share: float) -> Tensor:
    """The tokens in ``mask`` with the largest values, ``ceil(share N)`` of N, and all that equal the last of them.

    Example::

        >>> largest_share(torch.tensor([3.0, 1.0, 2.0, 9.0]), torch.tensor([True, True, True, False]), 0.5).tolist()
        [True, False, True, False]
    """
    values = torch.where(mask, steady(values), -torch.inf)
    # a relative guard: 0.2 of 10 tokens are 2, although 0.2 * 10 may round to more
    count = (mask.sum().double() * share * (1 - 1e-12)).ceil().long().clamp(min=1)
    ordered = values.flatten().sort(descending=True).values
    return mask & (values >= ordered[(count - 1).clamp(max=len(ordered) - 1)])


def first_tokens(order: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """The ``count`` tokens in ``mask`` that come first in ``order`` [R, T]; equal ones in the order of rows."""
    keys = torch.where(mask, order, torch.inf).flatten()
    place = torch.empty_like(keys, dtype=torch.int64)
    place[keys.argsort(stable=True)] = torch.arange(len(keys), device=keys.device)
    return mask & (place < count).view_as(mask)


def covariance(logprob: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """``(log pi_t - mean log pi) (A_t - mean A)`` of each token in ``mask``, the means over these; 0 elsewhere.

    Reference: "The Entropy Mechanism of RL for Reasoning LLMs" (arXiv 2505.22617), equation 8.
    """
    count = mask.sum().clamp(min=1)
    centred = [x.detach() - torch.where(mask, x.detach(), 0).sum() / count for x in (logprob, advantage)]
    return torch.where(mask, centred[0] * centred[1], 0)
