"""The loss of a policy update, put together from what is in the slots."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from litropy.recipes.steering.aggregation import SequenceMean
from litropy.recipes.steering.batch import RolloutBatch, UpdateBatch
from litropy.recipes.steering.grpo import GRPO
from litropy.recipes.steering.ppo_clip import PPOClip
from litropy.recipes.steering.slots import (
    Advantage,
    AdvantageShaping,
    Aggregation,
    Component,
    DataSelection,
    KLPenalty,
    Mismatch,
    PolicyClip,
    Regulariser,
    RewardShaping,
    TokenMask,
    TokenWeight,
)

__all__ = ["Methods", "Objective", "objective"]


@dataclass(frozen=True)
class Methods:
    """What fills the slots; the defaults are GRPO and nothing else.

    Attributes:
        shaping: changes of the reward, one after the other.
        data: which responses are trained on, None for all.
        advantage: from rewards.
        advantage_shaping: changes of the advantage, one after the other.
        masks: which tokens the policy loss is taken over; all must agree.
        weights: of the tokens' policy losses; multiplied.
        clip: the surrogate.
        penalties: added, each with its coefficient.
        regularisers: added.
        mismatch: a further weight, None for 1.
        aggregation: how tokens add up.
    """

    shaping: Sequence[RewardShaping] = ()
    data: DataSelection | None = None
    advantage: Advantage = field(default_factory=GRPO)
    advantage_shaping: Sequence[AdvantageShaping] = ()
    masks: Sequence[TokenMask] = ()
    weights: Sequence[TokenWeight] = ()
    clip: PolicyClip = field(default_factory=PPOClip)
    penalties: Sequence[KLPenalty] = ()
    regularisers: Sequence[Regulariser] = ()
    mismatch: Mismatch | None = None
    aggregation: Aggregation = field(default_factory=SequenceMean)

    @classmethod
    def of(cls, **slots: Any) -> "Methods":
        """Fill the slots; None leaves one as it is by default, a list becomes a tuple."""
        filled: dict[str, Any] = {name: value for name, value in slots.items() if value is not None}
        filled |= {name: tuple(value) for name, value in filled.items() if isinstance(value, list)}
        return cls(**filled)

    def named(self) -> Iterator[tuple[str, Component]]:
        """Every method with the name of its place."""
        for name, value in vars(self).items():
            if isinstance(value, Component):
                yield name, value
            elif value is not None:
                for place, component in enumerate(value):
                    yield f"{name}.{place}", component

    def shaped(self, batch: RolloutBatch) -> RolloutBatch:
        """The responses with the rewards that the shapings make of theirs."""
        for shaping in self.shaping:
            batch = replace(batch, reward=shaping.shape(batch))
        return batch

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """Advantage of each token before any shaping [R, T]."""
        return self.advantage.advantages(batch).expand(batch.mask.shape)


@dataclass(frozen=True)
class Objective:
    """What an update comes to.

    Attributes:
        loss: the sum of all terms, to be differentiated.
        terms: its parts, and what else is worth a curve, scalars.
        kept: the tokens that the policy loss is taken over, bool [R, T].
        weight: of each token's policy loss [R, T].
        advantage: after shaping [R, T].
        clipped: which tokens have no gradient because of the clip, bool [R, T]; None if it never clips.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    kept: Tensor
    weight: Tensor
    advantage: Tensor
    clipped: Tensor | None = None


def objective(methods: Methods, batch: UpdateBatch) -> Objective:
    r"""Put the loss of a mini-batch together.

    With shares a from the aggregation, masks m, weights w, the surrogate l and the penalties k of a token::

        loss = sum_t a_t m_t w_t l_t + sum_t a_t k_t + sum of the regularisers

    Args:
        methods: what is in the slots.
        batch: the mini-batch over all ranks; gradients flow to its current statistics.
    """
    with torch.no_grad():
        plain = batch.detached()
        for shaping in methods.advantage_shaping:
            plain = replace(plain, advantage=shaping.shape(plain))
        plain = replace(plain, clipped=methods.clip.clipped(plain))
        kept, counted = batch.mask, batch.mask
        for mask in methods.masks:
            chosen = mask.keep(plain)
            kept = kept & chosen
            counted = counted & chosen if mask.renormalise else counted
        factors = [component.weights(plain) for component in methods.weights]
        if methods.mismatch is not None:
            factors.append(methods.mismatch.weights(plain))
        weight = torch.ones_like(plain.advantage)
        for factor in factors:
            weight = weight * factor
        shares = methods.aggregation.shares(counted) * weight
    batch = replace(batch, advantage=plain.advantage, clipped=plain.clipped)
    policy = torch.where(kept, shares * methods.clip.losses(batch), 0).sum()
    loss, terms = policy, {"policy_loss": policy}
    if methods.penalties:
        with torch.no_grad():
            shares = methods.aggregation.shares(batch.mask)
        tokens = sum(penalty.penalties(batch) for penalty in methods.penalties)
        terms["penalty"] = torch.where(batch.mask, shares * tokens, 0).sum()
        loss = loss + terms["penalty"]
    for regulariser in methods.regularisers:
        name = type(regulariser).__name__
        terms[f"regulariser/{name}"] = terms.get(f"regulariser/{name}", 0) + regulariser.loss(batch)
    for name, term in terms.items():
        if name.startswith("regulariser/"):
            loss = loss + term
    terms |= {"kept_share": batch.token_mean(kept.float())}
    if plain.clipped is not None:
        terms["clipped_share"] = batch.token_mean(plain.clipped.float())
    return Objective(
        loss, {name: term.detach() for name, term in terms.items()}, kept, weight, plain.advantage, plain.clipped
    )
