"""Whether tokens were drawn from the distributions that a model gives them."""

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["OnPolicyScore"]


class OnPolicyScore:
    r"""Standard score of the surprise of sampled tokens, over the latest probes.

    A token y that is drawn from p has :math:`\mathrm{E}[-\ln p_y] = H(p)`, and the variance of :math:`-\ln p_y` is the
    varentropy :math:`V(p)`. Over tokens t of probes i, the older ones counting less,

    .. math:: z = \sum_i \lambda^{n-i} \sum_t (-\ln p_{y_t} - H_t) \Big/ \sqrt{\sum_i \lambda^{2(n-i)} \sum_t V_t}

    has mean 0 and variance 1, whatever the model. Far below 0, tokens are likelier than they should be: drawn at a
    lower temperature, or from the top p or k only. Far above 0, they are less likely: drawn at a higher temperature or
    from another model. The reverse does not hold: noise in the logits that is 0 on average hardly shows.

    Args:
        decay: :math:`\lambda`, from 0 (each probe alone) to below 1.

    Example::

        >>> score = OnPolicyScore(decay=0.0)
        >>> score.update(torch.tensor(-30.0), torch.tensor(36.0))
        tensor(-5.)
        >>> print(score.judge(-5.0))
        on-policy z is -5.0: the tokens are likelier than draws from the model's distributions; ...

    Reference: the test of Fast-DetectGPT, and of log-perplexity against entropy as a martingale.
    """

    limit = 4.0

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay
        self.excess: Tensor | None = None
        self.variance: Tensor | None = None

    def update(self, excess: Tensor, variance: Tensor) -> Tensor:
        """Take one probe's sums of -ln p - H [nats] and of varentropies; return z, NaN before the first token."""
        if self.excess is None or self.variance is None:
            self.excess, self.variance = torch.zeros_like(excess), torch.zeros_like(variance)
        self.excess = self.decay * self.excess.to(excess.device) + excess
        self.variance = self.decay**2 * self.variance.to(variance.device) + variance
        return self.excess / self.variance.sqrt()

    def judge(self, z: float) -> str | None:
        """Say what a score means, None if it is within the limit."""
        if not abs(z) > self.limit or math.isinf(z):
            return None
        if z < 0:
            how, why = (
                "likelier",
                "are they sampled at a lower temperature than the loss takes, or with top-p or top-k?",
            )
        else:
            how, why = "less likely", "do they come from another (an older) model, or a higher temperature?"
        return f"on-policy z is {z:.1f}: the tokens are {how} than draws from the model's distributions; {why}"

    def state_dict(self) -> dict[str, Any]:
        """The weighted sums, as numbers."""
        sums = (self.excess, self.variance)
        return {"sums": None if self.excess is None else [float(x) for x in sums if x is not None]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        sums = state_dict["sums"]
        self.excess, self.variance = (None, None) if sums is None else map(torch.tensor, sums)
