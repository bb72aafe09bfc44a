"""What of the output monitor needs memory: the drift of the log-sum-exp, and values to repeat."""

from typing import Any

import torch
from torch import Tensor

from litropy.callbacks.output_entropy import OutputSums

__all__ = ["OutputTrend"]


class OutputTrend:
    """Turns each probe's sums into means, and adds ``lse_drift``: the mean log-sum-exp less that of the first probe.

    A probe without any token repeats the values of the one before, so that nobody has to ask the device.

    Example::

        >>> trend = OutputTrend()
        >>> for lse in (5.0, 7.0):
        ...     values = trend.update(OutputSums.of(tokens=torch.tensor(2.0), lse=torch.tensor(2 * lse)))
        >>> values["lse"], values["lse_drift"]
        (tensor(7.), tensor(2.))
    """

    def __init__(self) -> None:
        self.last: dict[str, Tensor] = {}
        self.first_lse: Tensor | None = None

    def update(self, sums: OutputSums) -> dict[str, Tensor]:
        """Take one probe; return its values, NaN where there has been no token yet."""
        means = sums.means()
        for name, last in self.last.items():
            if name in means:
                count = sums.targets if name in ("cross_entropy", "calibration_gap") else sums.tokens
                means[name] = torch.where(count == 0, last.to(count.device), means[name])
        lse = means["lse"]
        first = lse if self.first_lse is None else self.first_lse.to(lse.device)
        self.first_lse = torch.where(first.isnan(), lse, first)
        means["lse_drift"] = lse - self.first_lse
        self.last = means
        return means

    def state_dict(self) -> dict[str, Any]:
        """The values, as numbers."""
        first = None if self.first_lse is None else float(self.first_lse)
        return {"last": {name: float(value) for name, value in self.last.items()}, "first_lse": first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        first = state_dict["first_lse"]
        self.last = {name: torch.tensor(value) for name, value in state_dict["last"].items()}
        self.first_lse = None if first is None else torch.tensor(first)
