"""Which combinations of methods do nothing, or count twice."""

from litropy.recipes.steering.aggregation import ConstantLength, SequenceMean, SequenceSum
from litropy.recipes.steering.cispo import CISPO
from litropy.recipes.steering.clip_cov import ClipCov
from litropy.recipes.steering.dr_grpo import DrGRPO
from litropy.recipes.steering.gspo import GSPO
from litropy.recipes.steering.kl_cov import KLCov
from litropy.recipes.steering.objective import Methods
from litropy.recipes.steering.reference_kl import ReferenceKL
from litropy.recipes.steering.sampler import Sampler
from litropy.recipes.steering.unclipped import Unclipped

__all__ = ["explain"]


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
    found = []
    covariance = [penalty for penalty in methods.penalties if isinstance(penalty, KLCov)]
    if one_update and covariance:
        found.append(
            "KLCov does nothing: with one optimiser step a batch the policy is the old one, and the penalty has no"
            " gradient."
        )
    if covariance and not isinstance(methods.clip, Unclipped):
        found.append(
            f"KLCov beside {type(methods.clip).__name__} bounds the chosen tokens twice; its paper has no clip"
            " (litropy.recipes.steering.Unclipped)."
        )
    if isinstance(methods.clip, CISPO) and any(isinstance(mask, ClipCov) for mask in methods.masks):
        found.append("ClipCov beside CISPO takes away gradients that CISPO is there to keep.")
    if isinstance(methods.clip, GSPO) and not isinstance(methods.aggregation, SequenceMean):
        found.append("GSPO's ratio is one a response, and its paper takes the mean a response: SequenceMean.")
    if isinstance(methods.advantage, DrGRPO) and not isinstance(methods.aggregation, ConstantLength | SequenceSum):
        found.append("DrGRPO without ConstantLength keeps the length bias that it is there to remove.")
    if len(methods.regularisers) > 1:
        names = ", ".join(type(regulariser).__name__ for regulariser in methods.regularisers)
        found.append(f"Several regularisers ({names}) push the same entropy; their coefficients add up.")
    if any(isinstance(penalty, ReferenceKL) and penalty.estimator == "k1" for penalty in methods.penalties):
        found.append("ReferenceKL with k1 only adds noise: its gradient has mean 0. Choose k2 or k3.")
    if sampler.truncates and methods.mismatch is None:
        found.append(
            f"{type(sampler).__name__} leaves tokens out, so what is sampled is not the policy that is trained; set"
            " `mismatch` (TruncatedImportance) to correct for it."
        )
    return found
