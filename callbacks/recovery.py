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
    tau: float = 5.0,
    hold_steps: int = 200,
    recovery_steps: int = 1000,
    names: list[str] | None = None,
    level: Literal[1, 2] = 2,
) -> list[Callback]:
    r"""Return the actions that bring attention entropy back after a collapse: all three are needed.

    First the learning rate falls, or heads collapse again. Then the optimiser forgets the moments of queries and keys,
    which would drive them back. As long as the rate is held, heads whose logits exceed ``tau`` are scaled down to it
    after each step: attention that is one-hot has no gradient to leave by, and what is clipped only once grows back
    even at the low rate.

    ``tau`` decides how much entropy comes back. Logits of standard deviation :math:`\sigma` leave about
    :math:`1 - \sigma^2 / (2 \ln n)` of the entropy of n keys, and the largest of very many is some :math:`4 \sigma`:
    a limit of 5 leaves about 0.8 for 64 keys and 0.9 for 4096.

    Args:
        learning_rate_factor: what the learning rate is multiplied by.
        tau: the largest attention logit that is left alone.
        hold_steps: optimiser steps at the low rate, and with that limit.
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
        QKClip(tau, level=level, alarm_steps=hold_steps),
    ]
