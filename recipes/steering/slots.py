"""The slots that a policy update is made of; a method is a small class that fills one.

To add a method: one file here with a subclass of a slot, one line in ``__init__.py`` beside it, and one line in
``tests/helpers/steering_cases.py``. What a method reads from the model beyond log-probability and entropy, it names in
``statistics``; what it remembers, it returns from ``state_dict``. A method sees the mini-batch of all ranks at once, so
that nothing it chooses depends on micro-batches or ranks.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal

from torch import Tensor

from litropy.recipes.steering.batch import RolloutBatch, UpdateBatch

__all__ = [
    "Advantage",
    "AdvantageShaping",
    "Aggregation",
    "Component",
    "DataSelection",
    "KLPenalty",
    "Mismatch",
    "PolicyClip",
    "Regulariser",
    "RewardShaping",
    "TokenMask",
    "TokenWeight",
]


class Component:
    """What all methods share.

    Attributes:
        statistics: names of the ``HeadStats`` fields that the method reads, beyond logprob and entropy.
        nucleus_mass: ``top_p`` of the nucleus, for one that reads nucleus_entropy.
        nucleus: whether the nucleus is ``"closed"`` or ``"open"``, as ``linear_head_stats`` takes it.
    """

    statistics: tuple[str, ...] = ()
    nucleus_mass: float | None = None
    nucleus: Literal["closed", "open"] = "closed"

    def after_step(self, batch: UpdateBatch) -> None:
        """Learn from an optimiser step that is over: its mini-batch as it was before the step, without gradients."""

    def state_dict(self) -> dict[str, Any]:
        """What the method remembers from step to step; goes into the checkpoint."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        assert not state_dict, f"{type(self).__name__} writes a state, but does not read it"


class RewardShaping(Component, ABC):
    """Changes rewards, once the responses and their statistics are known."""

    @abstractmethod
    def shape(self, batch: RolloutBatch) -> Tensor:
        """The new rewards [R]."""


class DataSelection(Component, ABC):
    """Chooses which responses are trained on.

    Attributes:
        stale: whether it may give back responses after an optimiser step that came later than they did.
    """

    stale: bool = False

    @abstractmethod
    def select(self, batch: RolloutBatch) -> RolloutBatch | None:
        """The responses to train on now, whole groups of them; None to go on sampling first."""


class Advantage(Component, ABC):
    """Turns rewards into advantages.

    Attributes:
        min_group_size: fewest responses a prompt that it can compare.
    """

    min_group_size: int = 2

    @abstractmethod
    def advantages(self, batch: RolloutBatch) -> Tensor:
        """Advantage of each token [R, T], or of each response [R, 1]."""


class AdvantageShaping(Component, ABC):
    """Changes advantages by what the current policy says about each token."""

    @abstractmethod
    def shape(self, batch: UpdateBatch) -> Tensor:
        """The new advantages [R, T]."""


class TokenMask(Component, ABC):
    """Chooses the tokens that the policy loss is taken over.

    Attributes:
        renormalise: whether means are taken over the chosen tokens only, and not over all.
    """

    renormalise: bool = False

    @abstractmethod
    def keep(self, batch: UpdateBatch) -> Tensor:
        """Which tokens count, bool [R, T]."""


class TokenWeight(Component, ABC):
    """Weights the tokens' policy losses."""

    @abstractmethod
    def weights(self, batch: UpdateBatch) -> Tensor:
        """Weight of each token [R, T]."""


class PolicyClip(Component, ABC):
    """The surrogate of the policy gradient: what a token's ratio and advantage cost."""

    @abstractmethod
    def losses(self, batch: UpdateBatch) -> Tensor:
        """Loss of each token [R, T], to be minimised; differentiable in ``batch.logprob``."""

    def clipped(self, batch: UpdateBatch) -> Tensor | None:
        """Which tokens have no gradient because of the clip, bool [R, T]; None if the method never clips."""
        return None


class KLPenalty(Component, ABC):
    """A penalty on tokens whose probability moves away from that of another policy.

    Attributes:
        needs_reference: whether that policy is the reference model.
    """

    needs_reference: bool = False

    @abstractmethod
    def penalties(self, batch: UpdateBatch) -> Tensor:
        """Penalty of each token [R, T], its coefficient included; differentiable in ``batch.logprob``."""


class Regulariser(Component, ABC):
    """A term of the loss that is a function of the entropies of the whole mini-batch."""

    @abstractmethod
    def loss(self, batch: UpdateBatch) -> Tensor:
        """The term, a scalar; differentiable in ``batch.entropy`` or another statistic that carries gradients."""


class Mismatch(Component, ABC):
    """Corrects for tokens that were drawn from another distribution than the policy's."""

    @abstractmethod
    def weights(self, batch: UpdateBatch) -> Tensor:
        """Weight of each token [R, T], from ``batch.old`` and ``batch.rollouts.behaviour``."""


class Aggregation(Component, ABC):
    """How the tokens' losses add up to one number."""

    @abstractmethod
    def shares(self, mask: Tensor) -> Tensor:
        """Factor of each token's loss in the sum [R, T], for the tokens ``mask`` [R, T] that count."""
