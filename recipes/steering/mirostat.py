"""Mirostat: sampling with the surprise of tokens held at a target."""

import math
from typing import Literal

import torch
from torch import Tensor

from litropy.kernels.likeliest import greatest, kth_greatest
from litropy.recipes.steering.sampler import TruncatingSampler, chances_from

__all__ = ["Mirostat", "zipf_cutoff"]

_LIKELIEST = 100  # falls of probability, from rank to rank, that Zipf's exponent is estimated from
_RELEASED_VOCABULARY = 50000


def zipf_cutoff(logits: Tensor, bound: Tensor, vocabulary: int) -> Tensor:
    """How many likeliest tokens have a surprise below a bound, if probabilities fall with the rank by Zipf's law.

    ``k = (eps e^mu / (1 - V^-eps))^(1 / s)``, ``eps = s - 1``, with the exponent s fitted to the 100 likeliest tokens.

    Args:
        logits: [B, V].
        bound: mu [B, nats].
        vocabulary: V of the law.

    Returns:
        k before rounding, at most the number of logits [B].

    Example::

        >>> zipf = -torch.arange(1, 1001).log()[None]  # s = 1
        >>> zipf_cutoff(zipf, torch.tensor([3.0]), 1000).round()
        tensor([3.])

    Reference: Mirostat (arXiv 2007.14966), algorithm 1.
    """
    return _cutoff(greatest(logits, _LIKELIEST + 1), bound, vocabulary, logits.shape[-1])


def _cutoff(top: Tensor, bound: Tensor, vocabulary: int, most: int) -> Tensor:
    step = torch.arange(1, top.shape[-1], device=top.device, dtype=top.dtype).reciprocal_().log1p_()
    known = top[:, 1:] > -torch.inf
    fall = torch.where(known, top[:, :-1] - top[:, 1:], 0)
    exponent = (fall * step).sum(-1) / (known * step.square()).sum(-1).clamp_(min=1e-12)
    exponent.clamp_(min=1e-3)
    excess = exponent - 1
    excess = torch.where(excess.abs() < 1e-4, 1e-4, excess)  # 0 / 0 at 0, where the limit is 1 / ln V
    log_scale = (excess / -torch.expm1(-math.log(vocabulary) * excess)).log_()
    return ((log_scale + bound) / exponent).clamp_(max=math.log(most)).exp_()


class Mirostat(TruncatingSampler):
    """Draws from the k likeliest tokens, with k such that what is drawn is as surprising as a target, on average.

    After each token, with ``S = -log p`` before anything was left out: ``mu <- mu - rate (S - target)``, in each
    response from ``mu = 2 target`` on.

    Args:
        target: tau [nats]; the paper takes 3 bits, 2.08 nats.
        rate: eta.
        cutoff: zipf takes k from Zipf's law at mu, as the paper does; surprise leaves out tokens whose own surprise is
            above mu, which assumes no law (known as Mirostat 2).
        temperature: of the softmax, taken before.
        released: take one token more, and 50000 for the size of the vocabulary, as the authors' code does.

    Raises:
        ValueError: if an option is out of its range.

    Reference: Mirostat (arXiv 2007.14966), algorithm 1.
    """

    def __init__(
        self,
        target: float = 2.0794415,
        rate: float = 1.0,
        cutoff: Literal["zipf", "surprise"] = "zipf",
        temperature: float = 1.0,
        released: bool = False,
    ) -> None:
        super().__init__(temperature)
        if not target > 0 or not rate > 0:
            raise ValueError(f"`target` ({target}) and `rate` ({rate}) must be above 0.")
        if cutoff not in ("zipf", "surprise"):
            raise ValueError(f"`cutoff` is {cutoff!r}; choose 'zipf' or 'surprise'.")
        self.target, self.rate, self.cutoff, self.released = target, rate, cutoff, released
        self._bound = torch.zeros(0)

    def begin(self, rows: int, device: torch.device) -> None:
        """Start every response at ``mu = 2 target``."""
        self._bound = torch.full((rows,), 2 * self.target, device=device)

    def chances(self, policy: Tensor) -> tuple[Tensor, None]:
        """Keep the k likeliest tokens, and those that equal the last of them."""
        if self.cutoff == "surprise":
            best, place = policy.max(-1, keepdim=True)
            return chances_from(policy, -self._bound.to(policy)).scatter_(1, place, best.exp()), None
        most = policy.shape[-1]
        vocabulary = _RELEASED_VOCABULARY if self.released else most
        top = greatest(policy, _LIKELIEST + 1)
        cutoff = _cutoff(top, self._bound, vocabulary, most)
        count = (cutoff.round().long() + int(self.released)).clamp(1, most)
        return chances_from(policy, kth_greatest(policy, count, top)), None

    def observe(self, logprob: Tensor) -> None:
        """Move mu by how far the surprise was from the target."""
        self._bound = self._bound - self.rate * (-logprob - self.target)
