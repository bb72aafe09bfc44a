"""Recent sample recovery: dynamic sampling that wastes less."""

from litropy.recipes.steering.dynamic_sampling import DynamicSampling

__all__ = ["RecentSampleRecovery"]


class RecentSampleRecovery(DynamicSampling):
    """Dynamic sampling whose surplus of useful groups is trained on in the next round, once, before newer ones.

    Such responses come from the policy of a round before. The paper trains on them as if they were new; here the ratio
    is taken to the policy that wrote them, so that the clip bounds what they do.

    Args:
        groups: prompts to train on in each round, over all ranks; what is left over waits for the next.
        low: groups with this share of right responses or less are dropped.
        high: groups with this share or more are dropped.
        max_batches: after this many batches of prompts, train on what there is.

    Raises:
        ValueError: if an option is out of its range.

    Reference: Confucius3-Math (arXiv 2506.18330), recent sample recovery.
    """

    stale = True
    keeps_rest = True
