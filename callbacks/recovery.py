"""The remedies that bring a run back whose attention has collapsed, in the order in which they act."""

from typing import Literal

from lightning.pytorch import Callback

from litropy.callbacks.learning_rate_backoff import LearningRateBackoff
from litropy.callbacks.qk_clip import QKClip
from litropy.callbacks.reset_moments import ResetMoments

__all__ = ["QUERY_KEY_PARAMETERS", "recovery_actions"]

# parameters that make queries and keys, by the names that they have in transformers and in torch
QUERY_KEY_PARAMETERS = (
    r"\b(q|k|query|key|qkv|q_[ab]|kv_[ab]|query_key_value|Wqkv|in)(_proj|_lin)?(_with_mqa)?[._](weight|bias)$"
    r"|\bc_attn\.(weight|bias)$"
)


def recovery_actions(
    learning_rate_factor: float = 0.1,
    tau: float = 10.0,
    hold_steps: int = 200,
    recovery_steps: int = 1000,
    names: list[str] | None = None,
    level: Literal[1, 2] = 2,
) -> list[Callback]:
    """Return the actions that bring attention entropy back after a collapse: all three are needed.

    First the learning rate falls, or heads collapse again. Then the optimiser forgets the moments of queries and keys,
    which would drive them back. After the next step, heads whose logits exceed ``tau`` are scaled down to it: attention
    that is one-hot has no gradient to leave by.

    Args:
        learning_rate_factor: what the learning rate is multiplied by.
        tau: the largest attention logit that is left alone.
        hold_steps: optimiser steps at the low rate.
        recovery_steps: optimiser steps after that until the whole rate is back.
        names: regular expressions of the parameters whose moments are forgotten; None takes the usual names of those
            that make queries and keys.
        level: lowest level of alarms to act on: 1 or 2.

    Example::

        >>> [type(action).__name__ for action in recovery_actions()]
        ['LearningRateBackoff', 'ResetMoments', 'QKClip']

        trainer = Trainer(callbacks=[AttentionEntropyMonitor(), CollapseDetector(actions=recovery_actions())])
    """
    return [
        LearningRateBackoff(learning_rate_factor, hold_steps, recovery_steps, level=level),
        ResetMoments(names or [QUERY_KEY_PARAMETERS], level=level),
        QKClip(tau, level=level),
    ]
