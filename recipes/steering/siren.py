"""SIREN: holds the entropy of the most uncertain tokens' nuclei where it began."""

from typing import Any

import torch
from torch import Tensor

from litropy.recipes.steering.batch import UpdateBatch, row_mean, stat
from litropy.recipes.steering.quantiles import row_quantile
from litropy.recipes.steering.selection import steady
from litropy.recipes.steering.slots import Regulariser

__all__ = ["SIREN"]


class SIREN(Regulariser):
    """``loss = beta (H - H_0)^2``, H the mean over responses of the mean nucleus entropy of their uncertain tokens.

    The nucleus entropy is that of the likeliest tokens that have the mass ``top_p`` together. A response's uncertain
    tokens are those whose nucleus entropy is above a quantile of all of its tokens; responses of equal tokens have none
    and are left out. ``H_0`` is H of the first mini-batch under the policy that wrote it.

    Args:
        coefficient: beta.
        top_p: mass of the nucleus, in (0, 1).
        quantile: tau, in [0, 1); 0.8 takes a fifth of the tokens.
        released: leave the token at which the mass is reached out of the nucleus, as the authors' code does: where one
            token has the mass alone, the entropy is then 0 without a gradient.

    Raises:
        ValueError: if an option is out of its range.

    Reference: SIREN (arXiv 2509.25133), selective entropy regularisation.
    """

    statistics = ("nucleus_entropy",)

    def __init__(
        self, coefficient: float = 5e-3, top_p: float = 0.8, quantile: float = 0.8, released: bool = False
    ) -> None:
        if not 0 < top_p < 1 or not 0 <= quantile < 1:
            raise ValueError(f"`top_p` ({top_p}) must be in (0, 1), and `quantile` ({quantile}) in [0, 1).")
        self.coefficient, self.quantile = coefficient, quantile
        self.nucleus_mass = top_p
        self.nucleus = "open" if released else "closed"
        self._anchor: Tensor | None = None

    def _mean(self, entropy: Tensor, mask: Tensor) -> Tensor:
        threshold = row_quantile(entropy, mask, self.quantile)[:, None]
        uncertain = mask & (steady(entropy) > steady(threshold))
        return row_mean(entropy, uncertain).sum() / uncertain.any(-1).sum().clamp(min=1)

    def loss(self, batch: UpdateBatch) -> Tensor:
        """``beta (H - H_0)^2``."""
        if self._anchor is None:
            self._anchor = self._mean(stat(batch.rollouts.stats, "nucleus_entropy"), batch.mask).detach().clone()
        mean = self._mean(stat(batch.current, "nucleus_entropy"), batch.mask)
        return self.coefficient * (mean - self._anchor.to(mean)).square()

    def state_dict(self) -> dict[str, Any]:
        """The anchor."""
        return {} if self._anchor is None else {"anchor": float(self._anchor)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        self._anchor = torch.tensor(state_dict["anchor"], dtype=torch.float64) if state_dict else None
