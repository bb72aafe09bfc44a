"""How a policy that learns from rewards hands its numbers to the callbacks that watch it.

A LightningModule with a method ``policy_readings`` is watched by ``PolicyMonitor``, ``EntropyChange`` and
``SampleTable``. After a training batch it returns what happened in that batch: a new object each time, and None before
the first responses. Tensors hold the responses of all ranks, R of them and T tokens at most, equal on every rank; the
samples are this rank's. A callback names the statistics that it needs beyond log-probability and entropy in
``policy_statistics``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

__all__ = ["PolicyReadings", "PolicySample", "PolicyUpdate", "PublishesPolicy", "asked_of_policy", "publisher"]


@dataclass(frozen=True)
class PolicySample:
    """One response in words.

    Attributes:
        prompt: what was asked.
        response: what the policy wrote.
        reward: what it got.
        correct: whether it solves its task.
        answer: what it answered, in a form that compares; None without an answer in the format.
        group: number of the prompt in the batch; responses to one prompt share it.
    """

    prompt: str
    response: str
    reward: float
    correct: bool
    answer: str | None
    group: int


@dataclass(frozen=True)
class PolicyUpdate:
    """One optimiser step: its tokens just before it, each [R, T], without gradients.

    Attributes:
        mask: where there are tokens, bool.
        logprob: of each token under the current policy [nats].
        entropy: of the current policy [nats].
        log_ratio: of the current policy to the one that wrote the tokens [nats].
        advantage: as the loss took it.
        weight: of each token's policy loss; 0 where a mask left the token out.
        slope: change of the entropy with the token's logit under softmax,
            ``-(p (ln p + H) - sum_v p_v^2 (ln p_v + H))``; None if no callback asks for ``entropy_drift``.
        clipped: which tokens have no gradient because of the clip, bool; None if the surrogate never clips.
    """

    mask: Tensor
    logprob: Tensor
    entropy: Tensor
    log_ratio: Tensor
    advantage: Tensor
    weight: Tensor
    slope: Tensor | None
    clipped: Tensor | None


@dataclass(frozen=True)
class PolicyReadings:
    """One batch of responses, and the optimiser steps on it.

    Attributes:
        step: ``trainer.global_step`` when the batch started.
        responses: tokens of the responses, padded on the right, int64 [R, T].
        mask: where they are tokens, bool [R, T].
        entropy: of the policy that wrote them [R, T, nats].
        correct: whether a response solves its task, bool [R].
        samples: the responses of this rank.
        updates: the optimiser steps, complete when the batch ends; empty if the batch was not trained on.
    """

    step: int
    responses: Tensor
    mask: Tensor
    entropy: Tensor
    correct: Tensor
    samples: Sequence[PolicySample]
    updates: Sequence[PolicyUpdate]


@runtime_checkable
class PublishesPolicy(Protocol):
    """A module that can be watched."""

    def policy_readings(self) -> PolicyReadings | None:
        """Return the latest batch, the same object until there is a newer one; None before the first."""


def publisher(pl_module: LightningModule, callback: object) -> PublishesPolicy:
    """The module as one that can be watched.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(pl_module, PublishesPolicy):
        raise ValueError(
            f"{type(callback).__name__} watches a policy that learns from rewards, such as RLVR;"
            f" {type(pl_module).__name__} has no `policy_readings`. Leave the callback out."
        )
    return pl_module


def asked_of_policy(trainer: Trainer) -> tuple[str, ...]:
    """The statistics that callbacks need of each batch of responses, beyond log-probability and entropy."""
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]
    return tuple(name for callback in callbacks for name in getattr(callback, "policy_statistics", ()))
