"""KL-Cov: a penalty on the tokens that would lower the entropy most."""

import torch
from torch import Tensor

from litropy.recipes.steering.batch import UpdateBatch
from litropy.recipes.steering.selection import covariance, largest_share
from litropy.recipes.steering.slots import KLPenalty

__all__ = ["KLCov"]


class KLCov(KLPenalty):
    """``beta |log pi_t - log pi_old,t|`` at the tokens with the largest covariances, a share of all; 0 elsewhere.

    ``Cov_t = (log pi_t - mean log pi) (A_t - mean A)``, the means over the mini-batch. The paper's loss has no clip
    beside it (``Unclipped``). While the policy is still the old one the penalty has no gradient: with one optimiser
    step a rollout this does nothing.

    Args:
        share: k, of all tokens, in (0, 1]; the paper takes 2e-3 for 7B and 2e-4 for 32B parameters.
        coefficient: beta.

    Raises:
        ValueError: if the share is out of its range.

    Reference: "The Entropy Mechanism of RL for Reasoning LLMs" (arXiv 2505.22617), equations 11 and 12.
    """

    def __init__(self, share: float = 2e-3, coefficient: float = 1.0) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"`share` is {share}; it must be in (0, 1].")
        self.share, self.coefficient = share, coefficient

    def penalties(self, batch: UpdateBatch) -> Tensor:
        """``beta |log r|`` of the chosen tokens."""
        chosen = largest_share(covariance(batch.logprob, batch.advantage, batch.mask), batch.mask, self.share)
        return torch.where(chosen, self.coefficient * batch.log_ratio.abs(), 0)
