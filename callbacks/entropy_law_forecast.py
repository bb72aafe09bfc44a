"""Forecast, while a policy trains, what accuracy it will have when its entropy is used up."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from litropy.callbacks.entropy_law import EntropyLaw, Forecast, fit_entropy_law

__all__ = ["EntropyLawForecast"]


class EntropyLawForecast(Callback):
    r"""Fit :math:`R = -a e^H + b` while a policy trains, and forecast the accuracy at which its entropy is used up.

    Reinforcement learning without a remedy buys accuracy R with entropy H [nats]; the law tells early how far that
    goes. After each batch it logs

    - ``entropy_law/a`` and ``entropy_law/b``, the coefficients;
    - ``entropy_law/ceiling``, :math:`b - a`, the accuracy at entropy 0, with ``entropy_law/ceiling_low`` and
      ``entropy_law/ceiling_high``, the ends of its interval;
    - ``entropy_law/explained``, the share of the variance of R that the law explains, from 0 to 1.

    The fit begins at five points. A ceiling outside of 0 to 1, or little variance explained, says that the run does not
    follow the law: because entropy is held up, or because there was no fall yet. The interval is that of the line, with
    points counted for less where residuals resemble those before; it knows nothing of a law that does not hold.

    Args:
        accuracy: logged metric to take for R. One under ``val/`` is read when a validation ends, and goes with the
            entropy of the batch before; others are read after every batch, and go with that batch's.
        entropy: logged metric to take for H [nats].
        confidence: share of cases in which the interval holds the line, in (0, 1).

    Attributes:
        law: the latest fit, None before the first.

    Raises:
        ValueError: if ``confidence`` is out of its range.

    Example::

        trainer = Trainer(callbacks=[EntropyLawForecast(accuracy="val/pass_at_1")])

    Reference: "The Entropy Mechanism of RL for Reasoning LLMs" (arXiv 2505.22617), equation 6.
    """

    def __init__(
        self, accuracy: str = "reward/correct", entropy: str = "entropy/output", confidence: float = 0.95
    ) -> None:
        if not 0 < confidence < 1:
            raise ValueError(f"`confidence` is {confidence}; it must be in (0, 1), such as 0.95.")
        self.accuracy, self.entropy, self.confidence = accuracy, entropy, confidence
        self.law: EntropyLaw | None = None
        self._points: list[tuple[float, float]] = []

    @property
    def points(self) -> list[tuple[float, float]]:
        """Entropy and accuracy of each point, in the order of steps."""
        return list(self._points)

    def forecast(self, entropy: float = 0.0) -> Forecast | None:
        """Accuracy to expect at an entropy [nats], with its interval; None before the first fit."""
        return None if self.law is None else self.law.forecast(entropy, self.confidence)

    @property
    def _validates(self) -> bool:
        return self.accuracy.startswith("val/")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a point, and log the fit."""
        if not self._validates:
            self._observe(trainer)
        ceiling = self.forecast()
        if self.law is None or ceiling is None:
            return
        values = {
            "a": self.law.a,
            "b": self.law.b,
            "explained": self.law.explained,
            "ceiling": ceiling.value,
            "ceiling_low": ceiling.low,
            "ceiling_high": ceiling.high,
        }
        pl_module.log_dict({f"entropy_law/{name}": torch.tensor(value) for name, value in values.items()})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take a point of the validation set, if that is what the accuracy is of."""
        if self._validates and not trainer.sanity_checking:
            self._observe(trainer)

    def _observe(self, trainer: Trainer) -> None:
        metrics = trainer.callback_metrics
        if self.accuracy not in metrics or self.entropy not in metrics:
            return  # a warm start or the validation before training
        # once a batch of responses, which cost a copy for every token; equal on all ranks, as the metrics are
        point = float(metrics[self.entropy]), float(metrics[self.accuracy])
        if all(map(math.isfinite, point)):
            self._points.append(point)
            self.law = fit_entropy_law(*zip(*self._points, strict=True))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if there was nothing to fit."""
        if not self._points:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            rank_zero_warn(
                f"EntropyLawForecast found no {self.accuracy!r} together with {self.entropy!r}; logged were: {logged}."
            )

    def state_dict(self) -> dict[str, Any]:
        """All points."""
        return {"points": [list(point) for point in self._points]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        self._points = [(entropy, accuracy) for entropy, accuracy in state_dict["points"]]
        self.law = fit_entropy_law(*zip(*self._points, strict=True)) if self._points else None
