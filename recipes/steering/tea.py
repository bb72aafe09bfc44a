"""TEA-RL: an entropy bonus for the tokens of a response whose update would lower the entropy most."""

import torch
from torch import Tensor

from litropy.recipes.steering.batch import UpdateBatch
from litropy.recipes.steering.slots import Regulariser

__all__ = ["TEA"]


class TEA(Regulariser):
    """``loss = -mean_t a_t H_t`` with ``a_t = min(scale softmax_t(c), most)``, the softmax over each response's tokens.

    ``c_t = (log pi_t - mean log pi) (A_t - mean A)``, the means over the mini-batch's tokens.

    Args:
        scale: of the softmax.
        most: the largest a.
        released: let gradients flow through a as well, as the authors' code would (it never gets there).

    Raises:
        ValueError: if an option is not positive.

    Reference: Light-IF (arXiv 2508.03178), token-wise entropy-adaptive regularisation; after the authors' code.
    """

    def __init__(self, scale: float = 10.0, most: float = 5.0, released: bool = False) -> None:
        if not scale > 0 or not most > 0:
            raise ValueError(f"`scale` ({scale}) and `most` ({most}) must be above 0.")
        self.scale, self.most, self.released = scale, most, released

    def loss(self, batch: UpdateBatch) -> Tensor:
        """``-mean_t a_t H_t``."""
        advantage = batch.advantage.detach()
        product = (batch.logprob - batch.token_mean(batch.logprob)) * (advantage - batch.token_mean(advantage))
        least = torch.finfo(product.dtype).min  # and not -inf, with which a response without tokens would be NaN
        attention = torch.where(batch.mask, product, least).softmax(-1)
        coefficient = (self.scale * attention).clamp(max=self.most)
        if not self.released:
            coefficient = coefficient.detach()
        return -batch.token_mean(coefficient * batch.entropy)
