"""How tokens are drawn: the base of samplers, and the plain one."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from litropy.recipes.steering.slots import Component

__all__ = ["Sampler", "TruncatingSampler", "chances_from", "entropy_of"]


class Sampler(Component):
    """Draws from ``softmax(z / T)`` at a fixed temperature; subclasses vary T, or leave tokens out.

    The policy that is trained is the distribution at the temperatures used, with every token in it. What a subclass
    leaves out makes the tokens' own distribution another one, which is recorded, and which the mismatch slot corrects.

    Args:
        temperature: T; the policy's probabilities are taken at it in training too.

    Raises:
        ValueError: if the temperature is not positive.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        if not temperature > 0:
            raise ValueError(f"`temperature` is {temperature}; it must be above 0.")
        self.temperature = temperature

    @property
    def truncates(self) -> bool:
        """Whether tokens are left out, so that what is drawn from is not the policy."""
        return type(self).truncate is not Sampler.truncate

    def begin(self, rows: int, device: torch.device) -> None:
        """A generation of that many responses begins."""

    def temperatures(self, logits: Tensor) -> Tensor:
        """Temperature of each row's next token [B], from the raw logits [B, V]."""
        return logits.new_full(logits.shape[:1], self.temperature)

    def truncate(self, logits: Tensor) -> Tensor:
        """Logits [B, V] (divided by the temperature), -inf at tokens that are not to be drawn."""
        return logits

    def chances(self, policy: Tensor) -> tuple[Tensor, Tensor | None]:
        """What tokens are drawn in proportion to, from the log-probabilities that the policy gives them.

        Args:
            policy: log-probabilities, [B, V].

        Returns:
            Weights [B, k], not below 0, and the tokens they belong to [B, k]; None if column v is token v.
        """
        return self.truncate(policy).softmax(-1), None

    def observe(self, logprob: Tensor) -> None:
        """Each row has drawn a token that had this log-probability before anything was left out [B, nats]."""


class TruncatingSampler(Sampler, ABC):
    """A sampler that leaves tokens out; subclasses say by their weights which."""

    @abstractmethod
    def chances(self, policy: Tensor) -> tuple[Tensor, Tensor | None]:
        """The probabilities of tokens that may be drawn; 0 for others."""

    def truncate(self, logits: Tensor) -> Tensor:
        """Put -inf where ``chances`` has nothing."""
        weights, tokens = self.chances(logits.log_softmax(-1))
        if tokens is not None:
            weights = torch.zeros_like(logits).scatter_add(-1, tokens, weights)
        return logits.masked_fill(weights == 0, -torch.inf)


def chances_from(policy: Tensor, least: Tensor) -> Tensor:
    """Probabilities of tokens whose log-probability [B, V] is not below the least that may be drawn [B]; 0 for others.

    Example::

        >>> chances_from(torch.tensor([[0.5, 0.2, 0.3]]).log(), torch.tensor([-1.5]))
        tensor([[0.5000, 0.0000, 0.3000]])
    """
    # which tokens are kept looks random: on a CPU a product is several times as fast as a choice by a mask
    kept = torch.ge(policy, least[:, None], out=torch.empty_like(policy))
    return kept.mul_(policy.softmax(-1))  # ``exp`` takes many times as long where it gives 0


def entropy_of(logprob: Tensor) -> Tensor:
    """Entropy of each row of log-probabilities [B, V]."""
    return -logprob.softmax(-1).mul_(logprob).nansum(-1)  # 0 times -inf is 0 here
