"""Compare the change of a policy's entropy that its updates predict with the one that comes."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from litropy.callbacks.policy_readings import PolicyReadings, publisher
from litropy.callbacks.policy_statistics import entropy_change

__all__ = ["ChangeFit", "EntropyChange"]


class ChangeFit:
    r"""Realised changes against those of first order, with weights that fall by ``decay`` a point.

    The slope goes through 0: :math:`\beta = \sum w x y / \sum w x^2`; the correlation is about 0 as well:
    :math:`\sum w x y / \sqrt{\sum w x^2 \sum w y^2}`.

    Example::

        >>> fit = ChangeFit()
        >>> for x in (1.0, -2.0, 3.0):
        ...     fit.update(x, 0.1 * x)
        >>> print(f"{fit.slope:.2f} {fit.correlation:.2f}")
        0.10 1.00
    """

    decay = 0.98

    def __init__(self) -> None:
        self.sums = [0.0, 0.0, 0.0]  # of x y, x x and y y

    def update(self, first_order: float, realised: float) -> None:
        """Take a point."""
        products = (first_order * realised, first_order**2, realised**2)
        self.sums = [self.decay * old + new for old, new in zip(self.sums, products, strict=True)]

    @property
    def slope(self) -> float | None:
        """Realised change a unit of the first order's; None before a point with any."""
        return self.sums[0] / self.sums[1] if self.sums[1] > 0 else None

    @property
    def correlation(self) -> float:
        """From -1 to 1; 0 as long as nothing has changed."""
        scale = math.sqrt(self.sums[1] * self.sums[2])
        return self.sums[0] / scale if scale > 0 else 0.0


class EntropyChange(Callback):
    """Log the entropy change that updates predict, and the one that is realised.

    After each batch of responses, about the batch before it:

    - ``entropy_change/realised``, mean entropy of these responses less that of the ones before [nats];
    - ``entropy_change/predicted``, the first-order change of those updates [nats]: times a factor, which stands for the
      learning rate and the model, and is fitted to the batches before (so not to the change that it is compared with);
    - ``entropy_change/correlation``, of both over the latest fifty batches or so, from -1 to 1;

    and about this batch ``entropy_change/first_order``, the change a unit step of the logits: below 0 the policy loss
    lowers the entropy. It knows the policy loss with its masks, weights and clip; a correlation near 0 says that
    something else moves the entropy: a regulariser, a penalty, or the choice of prompts.

    Raises:
        ValueError: when training starts, if the module is no policy that can be watched.

    Example::

        trainer = Trainer(callbacks=[EntropyChange()])

    Reference: after "Rethinking Entropy Interventions in RLVR" (arXiv 2510.10150), theorem 1.
    """

    policy_statistics = ("entropy_drift",)

    def __init__(self) -> None:
        self.fit = ChangeFit()
        self._seen: PolicyReadings | None = None
        self._before: tuple[float, float] | None = None  # entropy, and the first-order change that came upon it

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse modules that cannot be watched."""
        publisher(pl_module, self)
        self._seen = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare, if the batch was trained on."""
        found = publisher(pl_module, self).policy_readings()
        if found is None or found is self._seen or not found.updates:
            return
        if any(update.slope is None for update in found.updates):
            return  # responses that have waited since a run without this callback
        self._seen = found
        mean = torch.where(found.mask, found.entropy, 0).sum() / found.mask.sum().clamp(min=1)
        # one copy for a batch of responses, which cost one for every token
        entropy, change = torch.stack([mean, entropy_change(found.updates)]).tolist()
        values = {"first_order": change}
        if self._before is not None:
            earlier, first_order = self._before
            values["realised"] = entropy - earlier
            if self.fit.slope is not None:
                values["predicted"] = self.fit.slope * first_order
            self.fit.update(first_order, entropy - earlier)
            values["correlation"] = self.fit.correlation
        self._before = entropy, change
        pl_module.log_dict({f"entropy_change/{name}": torch.tensor(value) for name, value in values.items()})

    def state_dict(self) -> dict[str, Any]:
        """The fit, and what waits for its realised change."""
        return {"sums": list(self.fit.sums), "before": None if self._before is None else list(self._before)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        self.fit.sums = list(state_dict["sums"])
        before = state_dict["before"]
        self._before = None if before is None else (before[0], before[1])
