"""The penalty on the distance to the reference model."""

from typing import Literal

from torch import Tensor

from litropy.recipes.steering.batch import UpdateBatch
from litropy.recipes.steering.slots import KLPenalty

__all__ = ["ReferenceKL", "kl_estimate"]

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprob: Tensor, reference: Tensor, estimator: Estimator) -> Tensor:
    """Estimate of KL(pi || pi_ref) from tokens drawn from pi, one a token.

    With ``d = log pi_ref - log pi``::

        k1 = -d        k2 = d^2 / 2        k3 = e^d - d - 1

    k1 and k3 have the right mean. As losses they differ: k2's gradient is that of the KL, k1's has mean 0, k3's is that
    of the reverse KL(pi_ref || pi).

    Example::

        >>> import torch
        >>> kl_estimate(torch.tensor(-1.0), torch.tensor(-1.5), "k3")
        tensor(0.1065)

    Reference: Schulman 2020, "Approximating KL divergence".
    """
    d = reference - logprob
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    return d.clamp(max=20).exp() - d - 1


class ReferenceKL(KLPenalty):
    """``beta k(log pi, log pi_ref)`` at every token.

    Args:
        coefficient: beta; GRPO's paper takes 0.04, most runs since take 0.
        estimator: k1, k2 or k3 of ``kl_estimate``.

    Raises:
        ValueError: if the estimator is unknown.

    Reference: DeepSeekMath (arXiv 2402.03300), equation 4 (k3).
    """

    needs_reference = True

    def __init__(self, coefficient: float = 0.04, estimator: Estimator = "k3") -> None:
        if estimator not in ("k1", "k2", "k3"):
            raise ValueError(f"`estimator` is {estimator!r}; choose 'k1', 'k2' or 'k3'.")
        self.coefficient, self.estimator = coefficient, estimator

    def penalties(self, batch: UpdateBatch) -> Tensor:
        """``beta k`` of each token."""
        assert batch.rollouts.reference is not None
        return self.coefficient * kl_estimate(batch.logprob, batch.rollouts.reference, self.estimator)
