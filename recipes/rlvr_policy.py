"""What a policy says about given responses, without logits."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from litropy.losses import HeadStats, linear_head_stats
from litropy.recipes.causal_lm import CausalLM
from litropy.recipes.head_loss import head_operands
from litropy.recipes.steering.batch import RolloutBatch
from litropy.recipes.steering.slots import Component

__all__ = ["Wanted", "response_stats", "wanted_by"]

Nucleus = Literal["closed", "open"]


@dataclass(frozen=True)
class Wanted:
    """Which statistics to compute.

    Attributes:
        names: of ``HeadStats`` fields.
        top_p: mass of the nucleus, where its entropy is among them.
        nucleus: closed or open.
    """

    names: tuple[str, ...] = ("logprob", "entropy")
    top_p: float | None = None
    nucleus: Nucleus = "closed"

    def beside(self, *names: str) -> "Wanted":
        """These, and further ones."""
        return replace(self, names=tuple(dict.fromkeys((*self.names, *names))))


def wanted_by(components: Iterable[Component]) -> Wanted:
    """The statistics that some methods ask for together; log-probability and entropy always.

    Raises:
        ValueError: if two methods ask for different nuclei.
    """
    names = ["logprob", "entropy"]
    nuclei: dict[tuple[float, Nucleus], str] = {}
    for component in components:
        names += [name for name in component.statistics if name not in names]
        if component.nucleus_mass is not None:
            nuclei.setdefault((component.nucleus_mass, component.nucleus), type(component).__name__)
    if len(nuclei) > 1:
        described = ", ".join(f"{name} ({kind}, top_p {mass})" for (mass, kind), name in nuclei.items())
        raise ValueError(f"Methods ask for the entropies of different nuclei: {described}; give them the same `top_p`.")
    return Wanted(tuple(names), *next(iter(nuclei), ()))


def response_stats(policy: CausalLM, batch: RolloutBatch, wanted: Wanted, tokens: Tensor | None = None) -> HeadStats:
    """Statistics at the tokens of the responses, [R, T] each, 0 elsewhere; differentiable.

    Columns that are padding in all rows are not computed, and the head only sees the tokens that are wanted.

    Args:
        policy: the model.
        batch: the responses.
        wanted: which statistics.
        tokens: where they are wanted, bool [R, T]; at all tokens by default.
    """
    width = batch.mask.shape[1]
    if not len(batch):
        return HeadStats(**{name: batch.temperature.new_zeros(0, width) for name in wanted.names})
    used = batch.mask.any(0)
    # only mini-batches come here, after sampling has waited for the device many times
    first = int(batch.prompt_mask.any(0).long().argmax()) if batch.prompt_mask.shape[1] else 0
    length = int(used.sum())
    prompts, prompt_mask = batch.prompts[:, first:], batch.prompt_mask[:, first:]
    responses, mask = batch.responses[:, :length], batch.mask[:, :length]
    attention = torch.cat([prompt_mask, mask], 1).long()
    inputs: dict[str, Any] = {
        "input_ids": torch.cat([prompts, responses], 1)[:, :-1],
        "attention_mask": attention[:, :-1],
        "position_ids": (attention.cumsum(-1) - 1).clamp(min=0)[:, :-1],
    }
    inputs = {name: value for name, value in inputs.items() if name in policy.inputs}
    hidden = policy.backbone(**inputs, use_cache=False, return_dict=True).last_hidden_state
    hidden = hidden[:, prompts.shape[1] - 1 :]
    operands = head_operands(policy.head, policy.head_info, hidden)
    stats = linear_head_stats(
        operands.hidden,
        operands.weight,
        torch.where(mask if tokens is None else mask & tokens[:, :length], responses, -100),
        linear_bias=operands.bias,
        low_rank=operands.low_rank,
        softcap=policy.head_info.softcap,
        temperature=torch.where(mask, batch.temperature[:, :length], 1) / policy.head_info.scale,
        stats=wanted.names,
        top_p=wanted.top_p,
        nucleus=wanted.nucleus,
    )
    found = {f.name: getattr(stats, f.name) for f in fields(stats)}
    return HeadStats(**{k: F.pad(v, (0, width - length)) for k, v in found.items() if v is not None})
