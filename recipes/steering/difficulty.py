"""What ARES steers by: how hard a prompt is, and where a response stays uncertain for several tokens."""

import torch
from torch import Tensor

from litropy.recipes.steering.batch import RolloutBatch, stat
from litropy.recipes.steering.quantiles import row_quantile
from litropy.recipes.steering.selection import steady

__all__ = ["BUCKETS", "bucket_means", "difficulty", "uncertain_windows"]

BUCKETS = ("easy", "medium", "hard")


def difficulty(batch: RolloutBatch) -> Tensor:
    """Bucket of each response's prompt, by the share of right responses to it: 0 from 2/3 on, 1 from 1/3 on, else 2.

    Reference: ARES (arXiv 2510.08457), difficulty buckets; the bounds are those of its code.
    """
    # a margin for shares that are not 1/3 and 2/3 but for rounding
    share = batch.group_mean(batch.correct.double()) + 1e-9
    return (share < 2 / 3).long() + (share < 1 / 3).long()


def bucket_means(values: Tensor, bucket: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of ``values`` [R] over each bucket's responses, 0 without any, and how many there are, [3] each."""
    count = torch.bincount(bucket, minlength=len(BUCKETS))
    total = values.new_zeros(len(BUCKETS)).index_add(0, bucket, values)
    return total / count.clamp(min=1), count


def uncertain_windows(batch: RolloutBatch, width: int, quantile: float) -> Tensor:
    """Where the mean entropy of ``width`` tokens, from this one on, is above the responses' usual high, bool [R, T].

    The high is the mean over responses of the quantile of their tokens' entropies, under the policy that wrote them.

    Reference: ARES (arXiv 2510.08457), high-window-entropy tokens.
    """
    entropy = stat(batch.stats, "entropy")
    found = torch.zeros_like(batch.mask)
    span = entropy.shape[1] - width + 1
    if span > 0:
        some = batch.lengths > 0
        high = row_quantile(entropy, batch.mask, quantile).sum() / some.sum().clamp(min=1)
        means = entropy.unfold(1, width, 1).mean(-1)
        found[:, :span] = (steady(means) > steady(high)) & batch.mask[:, width - 1 :]
    return found
