"""ARES' dynamic KL penalty: a coefficient for each difficulty, loosened where a response explores."""

from typing import Any

import torch
from torch import Tensor

from litropy.recipes.steering.batch import UpdateBatch, row_mean
from litropy.recipes.steering.difficulty import BUCKETS, bucket_means, difficulty, uncertain_windows
from litropy.recipes.steering.reference_kl import kl_estimate
from litropy.recipes.steering.slots import KLPenalty

__all__ = ["BucketKL"]


class BucketKL(KLPenalty):
    """``beta_d lambda_d rho_t k3``: beta for the prompt's difficulty d, rho below 1 in uncertain windows.

    After each step ``lambda_d <- max(0, lambda_d + rate (KL_d - target_d))``, from 1 on, with KL_d the mean over
    responses of their tokens' mean k3: a bucket that has moved further from the reference than its target pays more.

    Args:
        easy: beta for prompts with 2/3 right responses or more.
        medium: beta for those with 1/3 or more.
        hard: beta for the rest.
        easy_target: KL_d [nats a token] that easy prompts' responses are held to.
        medium_target: that of medium prompts.
        hard_target: that of hard prompts.
        rate: of lambda; 0 leaves it at 1.
        relief: rho in uncertain windows, in [0, 1].
        width: tokens of a window.
        quantile: of a response's entropies, above which a window's mean is high, in (0, 1).
        released: let beta take lambda in for good, ``beta_d <- lambda_d beta_d`` after each step, and rho = 1, as the
            authors' code does.

    Raises:
        ValueError: if an option is out of its range.

    Reference: ARES (arXiv 2510.08457), dynamic KL; the numbers are those of the authors' code, but for ``relief``:
    the paper has it without a number.
    """

    needs_reference = True

    def __init__(
        self,
        easy: float = 2e-3,
        medium: float = 1e-3,
        hard: float = 5e-4,
        easy_target: float = 0.05,
        medium_target: float = 0.1,
        hard_target: float = 0.2,
        rate: float = 0.01,
        relief: float = 0.5,
        width: int = 4,
        quantile: float = 0.95,
        released: bool = False,
    ) -> None:
        if min(easy, medium, hard, rate) < 0 or not 0 <= relief <= 1:
            raise ValueError(f"Coefficients and `rate` must be at least 0, and `relief` ({relief}) in [0, 1].")
        if width < 1 or not 0 < quantile < 1:
            raise ValueError(f"`width` ({width}) must be at least 1, and `quantile` ({quantile}) in (0, 1).")
        self.rate, self.relief, self.width, self.quantile, self.released = rate, relief, width, quantile, released
        self._targets = torch.tensor([easy_target, medium_target, hard_target], dtype=torch.float64)
        self._coefficients = torch.tensor([easy, medium, hard], dtype=torch.float64)
        self._multipliers = torch.ones(len(BUCKETS), dtype=torch.float64)

    def _k3(self, batch: UpdateBatch) -> Tensor:
        assert batch.rollouts.reference is not None
        return kl_estimate(batch.logprob, batch.rollouts.reference, "k3")

    def penalties(self, batch: UpdateBatch) -> Tensor:
        """The penalty of each token."""
        divergence = self._k3(batch)
        coefficients = self._coefficients if self.released else self._coefficients * self._multipliers
        beta = coefficients.to(divergence)[difficulty(batch.rollouts)][:, None]
        if self.released:
            return beta * divergence
        loose = uncertain_windows(batch.rollouts, self.width, self.quantile)
        return torch.where(loose, self.relief, 1) * beta * divergence

    def after_step(self, batch: UpdateBatch) -> None:
        """Move the multipliers of the buckets that the mini-batch has."""
        distance, count = bucket_means(row_mean(self._k3(batch), batch.mask).double(), difficulty(batch.rollouts))
        before, coefficients, targets = (
            value.to(distance.device) for value in (self._multipliers, self._coefficients, self._targets)
        )
        self._multipliers = torch.where(count > 0, (before + self.rate * (distance - targets)).clamp(min=0), before)
        if self.released:
            coefficients = torch.where(count > 0, self._multipliers * coefficients, coefficients)
        self._coefficients, self._targets = coefficients, targets

    def state_dict(self) -> dict[str, Any]:
        """Coefficients and multipliers by bucket."""
        return {"coefficients": self._coefficients.tolist(), "multipliers": self._multipliers.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        self._coefficients = torch.tensor(state_dict["coefficients"], dtype=torch.float64)
        self._multipliers = torch.tensor(state_dict["multipliers"], dtype=torch.float64)
