"""HAPO's measure of a token: how far its log-entropy is from a pivot, from -1 to 1."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LogEntropyScale"]

_FLOOR = 1e-8
_LEAST = 1e-12


@dataclass(frozen=True)
class LogEntropyScale:
    """The pivot of a batch's log-entropies, and their range on both sides of it; scalars.

    With ``l_t = log max(H_t, 1e-8)``, pivot m the quantile of l over all tokens, and s the root mean square of l - m,
    ``h = (l - m) / s`` is divided by its maximum where it is positive, and by the size of its minimum elsewhere.

    Attributes:
        pivot: m.
        above: ``s max h``, how far the largest log-entropy is above the pivot.
        below: ``s |min h|``, how far the smallest is below.

    Reference: HAPO (arXiv 2509.16591), token entropy normalisation. s cancels, and is not kept.
    """

    pivot: Tensor
    above: Tensor
    below: Tensor

    @staticmethod
    def of(entropy: Tensor, mask: Tensor, quantile: float) -> "LogEntropyScale":
        """Measure the tokens in ``mask``; the quantile is the value of the nearest rank.

        Args:
            entropy: [R, T, nats].
            mask: bool [R, T].
            quantile: of the pivot, from 0 to 1.
        """
        logs = entropy.detach().clamp(min=_FLOOR).log()
        ordered = torch.where(mask, logs, torch.inf).flatten().sort().values
        count = mask.sum()
        place = ((count - 1).clamp(min=0).double() * quantile).round().long()
        largest = torch.where(mask, logs, -torch.inf).amax()
        pivot, smallest, largest = (torch.where(count > 0, value, 0) for value in (ordered[place], ordered[0], largest))
        return LogEntropyScale(pivot, largest - pivot, pivot - smallest)

    def measure(self, entropy: Tensor, released: bool = False) -> Tensor:
        """H of tokens, within -1 and 1, without gradient.

        Args:
            entropy: [nats].
            released: divide by the minimum with its sign, as the authors' code does: tokens below the pivot become
                positive, too, so that nothing made for low entropies ever happens.
        """
        offset = entropy.detach().clamp(min=_FLOOR).log() - self.pivot
        high = offset / self.above.clamp(min=_LEAST)
        low = offset / self.below.clamp(min=_LEAST)
        return torch.where(offset > 0, high, -low if released else low).clamp(-1, 1)
