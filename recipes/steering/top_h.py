"""Top-H sampling."""

import torch
from torch import Tensor

from litropy.kernels.likeliest import first_likeliest, likeliest
from litropy.recipes.steering.sampler import TruncatingSampler, entropy_of

__all__ = ["TopH"]

_RELEASED_CANDIDATES = 100


class TopH(TruncatingSampler):
    """Draws from the largest set of likeliest tokens whose entropy is at most a share of the whole's.

    ``H(q) <= alpha H(p)``, q being p on the set, divided by its mass m: ``H(q) = log m - sum p log p / m``, which only
    grows with the set.

    Args:
        share: alpha, in (0, 1].
        temperature: of the softmax, taken before.
        released: compare ``-sum p log p`` over the set in place of its entropy, among the 100 likeliest tokens, as the
            authors' code and Hugging Face's ``TopHLogitsWarper`` do; this keeps more tokens.

    Raises:
        ValueError: if an option is out of its range.

    Example::

        >>> TopH(share=0.4).truncate(torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()).exp()
        tensor([[0.5000, 0.0000, 0.0000, 0.0000]])

    Reference: Top-H (arXiv 2509.02510), algorithm 1.
    """

    def __init__(self, share: float = 0.4, temperature: float = 1.0, released: bool = False) -> None:
        super().__init__(temperature)
        if not 0 < share <= 1:
            raise ValueError(f"`share` is {share}; it must be in (0, 1].")
        self.share, self.released = share, released

    def chances(self, policy: Tensor) -> tuple[Tensor, Tensor]:
        """Drop what comes after the last token that fits."""
        if self.released:  # the softmax is that of the candidates alone
            top, tokens = likeliest(policy, _RELEASED_CANDIDATES)
            terms = _terms(top.log_softmax(-1))
            beyond = terms.cumsum(-1) > self.share * terms.sum(-1, keepdim=True)
            beyond[:, 0] = False
            return top.masked_fill(beyond, -torch.inf).softmax(-1), tokens
        bound = self.share * entropy_of(policy)[:, None]

        def behind(top: Tensor, rows: Tensor) -> Tensor:
            mass = top.exp().cumsum(-1)
            return mass.log() + _terms(top).cumsum(-1) / mass > bound[rows]

        kept, tokens = first_likeliest(policy, behind)
        return kept.softmax(-1), tokens


def _terms(logprob: Tensor) -> Tensor:
    """``-p log p``, 0 where p is."""
    return -(logprob.exp() * logprob).nan_to_num(0)
