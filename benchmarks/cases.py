"""The problems that the linear head is measured on: random numbers, or what a trained model makes of held-out text."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from trained_head import TrainedHead

RANDOM, TRAINED = "random", "trained"


@dataclass(frozen=True)
class Case:
    """One problem: N tokens, width D, vocabulary V, in one dtype."""

    tokens: int
    width: int
    vocabulary: int
    dtype: str
    head_file: str = ""  # of a trained head; empty: random numbers

    @staticmethod
    def trained(head_file: Path, tokens: int, dtype: str) -> "Case":
        """The case of so many tokens of a trained head."""
        with safe_open(head_file, "pt") as file:
            vocabulary, width = file.get_slice("weight").get_shape()
        return Case(tokens, width, vocabulary, dtype, str(head_file))

    def record(self) -> dict[str, Any]:
        """What the results say about the case."""
        record = asdict(self)
        return {"data": TRAINED if record.pop("head_file") else RANDOM, **record}

    def inputs(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, weight and targets, the same in every process; gradients go to the first two.

        Random ones have logits of standard deviation 2 and targets at random.
        """
        dtype = getattr(torch, self.dtype)
        if self.head_file:
            head = TrainedHead.load(Path(self.head_file)).sample(self.tokens)
            hidden, weight = (x.to(device, dtype) for x in (head.hidden, head.weight))
            return hidden.requires_grad_(), weight.requires_grad_(), head.target.to(device)
        generator = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(self.tokens, self.width, generator=generator, device=device, dtype=dtype)
        weight = torch.randn(self.vocabulary, self.width, generator=generator, device=device, dtype=dtype)
        weight.mul_(2 / self.width**0.5)
        target = torch.randint(self.vocabulary, (self.tokens,), generator=generator, device=device)
        return hidden.requires_grad_(), weight.requires_grad_(), target
