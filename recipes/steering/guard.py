"""Which combinations of methods do nothing, or count twice."""

from collections.abc import Iterator, Sequence

from litropy.recipes.steering.adaptive_clip import AdaptiveClip
from litropy.recipes.steering.aggregation import ConstantLength, SequenceMean, SequenceSum
from litropy.recipes.steering.bucket_kl import BucketKL
from litropy.recipes.steering.ce_gppo import CEGPPO
from litropy.recipes.steering.cispo import CISPO
from litropy.recipes.steering.clip_cov import ClipCov
from litropy.recipes.steering.dr_grpo import DrGRPO
from litropy.recipes.steering.entropy_advantage import EntropyAdvantage
from litropy.recipes.steering.forking_tokens import ForkingTokens
from litropy.recipes.steering.gspo import GSPO
from litropy.recipes.steering.kl_cov import KLCov
from litropy.recipes.steering.objective import Methods
from litropy.recipes.steering.pear import PEAR
from litropy.recipes.steering.pshw import PSHW
from litropy.recipes.steering.reference_kl import ReferenceKL
from litropy.recipes.steering.sampler import Sampler
from litropy.recipes.steering.slots import Component
from litropy.recipes.steering.steer import STEER
from litropy.recipes.steering.unclipped import Unclipped

__all__ = ["explain"]


def _names(components: Sequence[Component]) -> str:
    return ", ".join(type(component).__name__ for component in components)


def _without_effect(methods: Methods, one_update: bool) -> Iterator[str]:
    """Methods that act on how far the policy has moved, where it has not."""
    if not one_update or (methods.data is not None and methods.data.stale):
        return
    if any(isinstance(penalty, KLCov) for penalty in methods.penalties):
        yield (
            "KLCov does nothing: with one optimiser step a batch the policy is the old one, and the penalty has no"
            " gradient."
        )
    if isinstance(methods.clip, CEGPPO | AdaptiveClip):
        yield (
            f"{type(methods.clip).__name__} does nothing: with one optimiser step a batch all ratios are 1; set"
            " `epochs` or `mini_batch_size`."
        )


def _counted_twice(methods: Methods) -> Iterator[str]:
    """Methods that do the same thing, or opposite ones."""
    covariance = [penalty for penalty in methods.penalties if isinstance(penalty, KLCov)]
    clip_cov = [mask for mask in methods.masks if isinstance(mask, ClipCov)]
    steer = [weight for weight in methods.weights if isinstance(weight, STEER)]
    if covariance and not isinstance(methods.clip, Unclipped):
        yield (
            f"KLCov beside {type(methods.clip).__name__} bounds the chosen tokens twice; its paper has no clip"
            " (litropy.recipes.steering.Unclipped)."
        )
    holding = [*clip_cov, *covariance, *steer]
    if len(holding) > 1:
        yield f"{_names(holding)} hold back the same tokens, those that would lower the entropy most; one will do."
    if isinstance(methods.clip, CISPO) and clip_cov:
        yield "ClipCov beside CISPO takes away gradients that CISPO is there to keep."
    if len(methods.regularisers) > 1:
        names = _names(methods.regularisers)
        yield f"Several regularisers ({names}) push the same entropy; their coefficients add up."
    distances = [penalty for penalty in methods.penalties if isinstance(penalty, ReferenceKL | BucketKL)]
    if len(distances) > 1:
        yield f"{_names(distances)} penalise the same distance to the reference; their coefficients add up."
    raising = [*methods.regularisers, *(x for x in methods.advantage_shaping if isinstance(x, EntropyAdvantage))]
    if raising and any(isinstance(shaping, PEAR) for shaping in methods.shaping):
        yield f"PEAR lowers the entropy of thinking, which {_names(raising)} is there to keep up."


def _aggregated_otherwise(methods: Methods) -> Iterator[str]:
    """Methods that mean another sum of tokens than the one that is set."""
    if isinstance(methods.clip, GSPO):
        if not isinstance(methods.aggregation, SequenceMean):
            yield "GSPO's ratio is one a response, and its paper takes the mean a response: SequenceMean."
        if methods.masks:
            yield (
                f"{_names(methods.masks)} beside GSPO leaves no token out: the kept ones' gradient reaches all"
                " tokens of the response through its ratio."
            )
    if isinstance(methods.advantage, DrGRPO) and not isinstance(methods.aggregation, ConstantLength | SequenceSum):
        yield "DrGRPO without ConstantLength keeps the length bias that it is there to remove."
    if isinstance(methods.advantage, PSHW) and not isinstance(methods.aggregation, ConstantLength | SequenceSum):
        yield "PSHW's paper adds a response's tokens up, without dividing by their number: SequenceSum."
    for mask in methods.masks:
        if isinstance(mask, ForkingTokens) and not mask.renormalise:
            yield (
                f"ForkingTokens without `renormalise` makes the policy loss about {mask.share:g} times the paper's,"
                " whose mean is over the kept tokens."
            )


def explain(methods: Methods, sampler: Sampler, one_update: bool) -> list[str]:
    """Say which of the methods do nothing together, or do the same thing twice.

    Args:
        methods: what is in the slots.
        sampler: how tokens are drawn.
        one_update: whether each batch of responses is trained on in a single optimiser step.

    Returns:
        Sentences for the user, none if all is well.

    Example::

        >>> explain(Methods(penalties=[KLCov()], clip=Unclipped()), Sampler(), one_update=True)
        ['KLCov does nothing: with one optimiser step a batch the policy is the old one, ...']
    """
    found = [*_without_effect(methods, one_update), *_counted_twice(methods), *_aggregated_otherwise(methods)]
    if any(isinstance(penalty, ReferenceKL) and penalty.estimator == "k1" for penalty in methods.penalties):
        found.append("ReferenceKL with k1 only adds noise: its gradient has mean 0. Choose k2 or k3.")
    if sampler.truncates and methods.mismatch is None:
        found.append(
            f"{type(sampler).__name__} leaves tokens out, so what is sampled is not the policy that is trained; set"
            " `mismatch` (TruncatedImportance) to correct for it."
        )
    return found
