"""What the methods see: sampled responses with their statistics, and an optimiser's mini-batch of them."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from litropy.losses import HeadStats

__all__ = ["RolloutBatch", "UpdateBatch", "index_rows", "row_mean", "stat"]


def stat(stats: HeadStats, name: str) -> Tensor:
    """A row statistic that a method has asked for in its ``statistics``."""
    value = getattr(stats, name)
    assert value is not None, f"a method reads {name} without asking for it in `statistics`"
    return value


def index_rows(values: Any, rows: Tensor) -> Any:
    """The chosen rows of every tensor in a dataclass."""
    changed: dict[str, Any] = {}
    for field in fields(values):
        value = getattr(values, field.name)
        if isinstance(value, HeadStats):
            changed[field.name] = index_rows(value, rows)
        elif isinstance(value, Tensor):
            changed[field.name] = value[rows]
    return replace(values, **changed)


def row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` [R, T] over each row's tokens in ``mask`` [R, T]; 0 for a row without any."""
    return torch.where(mask, values, 0).sum(-1) / mask.sum(-1).clamp(min=1)


@dataclass(frozen=True)
class RolloutBatch:
    """Responses to prompts, one a row, in an order that does not depend on the number of ranks.

    Attributes:
        prompts: tokens of the prompts, padded on the left, int64 [R, P].
        prompt_mask: where they are tokens, bool [R, P].
        responses: tokens of the responses, padded on the right, int64 [R, T].
        mask: where they are tokens, the end token included, bool [R, T].
        behaviour: log-probability of each token under the distribution it was drawn from [R, T, nats].
        temperature: temperature at which the policy's probabilities are taken [R, T].
        row: number of the response, rising, int64 [R].
        group: number of its prompt; responses to one prompt share it, int64 [R].
        reward: [R].
        correct: whether the response solves its task, bool [R].
        truncated: whether it was cut off before an end token, bool [R].
        stats: statistics of the policy that is about to be updated, each [R, T]; 0 outside ``mask``.
        reference: log-probabilities of the tokens under the reference model [R, T, nats], None without one.
    """

    prompts: Tensor
    prompt_mask: Tensor
    responses: Tensor
    mask: Tensor
    behaviour: Tensor
    temperature: Tensor
    row: Tensor
    group: Tensor
    reward: Tensor
    correct: Tensor
    truncated: Tensor
    stats: HeadStats
    reference: Tensor | None = None

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, rows: Tensor) -> "RolloutBatch":
        return index_rows(self, rows)

    def to_dict(self) -> dict[str, Any]:
        """Its tensors by name, for a checkpoint."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        stats = {name: value for name, value in vars(self.stats).items() if value is not None}
        return values | {"stats": stats}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "RolloutBatch":
        """The batch that ``to_dict`` took apart."""
        return RolloutBatch(**values | {"stats": HeadStats(**values["stats"])})

    def to(self, device: torch.device) -> "RolloutBatch":
        """The batch on a device."""
        values = self.to_dict()
        stats = {name: value.to(device) for name, value in values.pop("stats").items()}
        moved = {name: None if value is None else value.to(device) for name, value in values.items()}
        return RolloutBatch.from_dict(moved | {"stats": stats})

    @property
    def lengths(self) -> Tensor:
        """Tokens in each response, int64 [R]."""
        return self.mask.sum(-1)

    def group_index(self) -> tuple[Tensor, Tensor]:
        """Each row's place in the list of groups [R], and how many rows each group has [groups]."""
        _, index, count = torch.unique(self.group, return_inverse=True, return_counts=True)
        return index, count

    def bessel(self) -> Tensor:
        """``G / (G - 1)`` for each row's group of G, [R]; 1 for a group of one."""
        index, count = self.group_index()
        return (count.to(self.reward.dtype) / (count - 1).clamp(min=1))[index]

    def group_mean(self, values: Tensor) -> Tensor:
        """Mean of ``values`` [R] over each row's group, [R]."""
        index, count = self.group_index()
        return (values.new_zeros(len(count)).index_add(0, index, values) / count)[index]

    def equal_rewards(self) -> Tensor:
        """Whether all responses in a row's group have the same reward, bool [R]."""
        index, count = self.group_index()
        extreme = [
            self.reward.new_zeros(len(count)).scatter_reduce(0, index, self.reward, kind, include_self=False)
            for kind in ("amin", "amax")
        ]
        return (extreme[0] == extreme[1])[index]

    def centred_reward(self) -> Tensor:
        """Rewards less their group's mean [R]; exactly 0 where a group's are equal, whatever the rounding."""
        return torch.where(self.equal_rewards(), 0, self.reward - self.group_mean(self.reward))


@dataclass(frozen=True)
class UpdateBatch:
    """A mini-batch of one optimiser step, over all ranks.

    Attributes:
        rollouts: the responses.
        advantage: advantage of each token [R, T].
        current: statistics under the current weights, each [R, T]; ``logprob``, ``entropy`` and ``nucleus_entropy``
            carry gradients.
        clipped: which tokens have no gradient because of the clip, bool [R, T]; None if it never clips.
    """

    rollouts: RolloutBatch
    advantage: Tensor
    current: HeadStats
    clipped: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """Where there are tokens, bool [R, T]."""
        return self.rollouts.mask

    @property
    def logprob(self) -> Tensor:
        """Log-probability of each token under the current policy [R, T, nats]."""
        return stat(self.current, "logprob")

    @property
    def entropy(self) -> Tensor:
        """Entropy of the current policy at each position [R, T, nats]."""
        return stat(self.current, "entropy")

    @property
    def old(self) -> Tensor:
        """Log-probability of each token under the policy before the first update on these responses [R, T, nats]."""
        return stat(self.rollouts.stats, "logprob")

    @property
    def log_ratio(self) -> Tensor:
        """``log pi - log pi_old`` of each token [R, T]."""
        return self.logprob - self.old

    @property
    def ratio(self) -> Tensor:
        """``pi / pi_old`` of each token [R, T]; kept within e^-20 and e^20, so that no product of it is NaN."""
        return self.log_ratio.clamp(-20, 20).exp()

    def token_mean(self, values: Tensor) -> Tensor:
        """Mean of ``values`` [R, T] over all tokens, a scalar; 0 without any."""
        return torch.where(self.mask, values, 0).sum() / self.mask.sum().clamp(min=1)

    def detached(self) -> "UpdateBatch":
        """The same numbers, without gradients."""
        values = {f.name: getattr(self.current, f.name) for f in fields(self.current)}
        current = HeadStats(**{name: value.detach() for name, value in values.items() if value is not None})
        return replace(self, current=current)
