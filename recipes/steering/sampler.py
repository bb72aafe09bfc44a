"""How tokens are drawn: the base of samplers, and the plain one."""

import torch
from torch import Tensor

from litropy.recipes.steering.slots import Component

__all__ = ["Sampler", "keep_at_least_one"]


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

    def observe(self, logprob: Tensor) -> None:
        """Each row has drawn a token that had this log-probability before anything was left out [B, nats]."""


def keep_at_least_one(logits: Tensor, drop: Tensor) -> Tensor:
    """Put -inf where ``drop`` [B, V] says so, but for the likeliest token of each row."""
    best = logits.argmax(-1, keepdim=True)
    return logits.masked_fill(drop.scatter(-1, best, False), -torch.inf)
