"""Cut the learning rate on an alarm, and let it recover."""

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from litropy.callbacks.collapse_alarm import Alarm

__all__ = ["Backoff", "LearningRateBackoff"]


class Backoff:
    r"""A factor that falls at an alarm, holds, and recovers geometrically.

    With :math:`f_0` the factor right after the last alarm and :math:`n` the steps since then:
    :math:`f = f_0^{1 - r}`, :math:`r = \min(1, \max(0, (n - \mathrm{hold}) / \mathrm{recovery}))`.

    Args:
        factor: what an alarm multiplies the present factor by.
        hold_steps: steps without recovery.
        recovery_steps: steps from the lowest factor back to 1.
        min_factor: the factor never falls below.

    Example::

        >>> backoff = Backoff(factor=0.01, hold_steps=10, recovery_steps=100, min_factor=1e-3)
        >>> backoff.alarm(step=50)
        True
        >>> [round(backoff.at(step), 3) for step in (50, 60, 110, 160)]
        [0.01, 0.01, 0.1, 1.0]
    """

    def __init__(self, factor: float, hold_steps: int, recovery_steps: int, min_factor: float) -> None:
        self.factor = factor
        self.hold_steps = hold_steps
        self.recovery_steps = recovery_steps
        self.min_factor = min_factor
        self.lowest = 1.0
        self.since: int | None = None

    def at(self, step: int) -> float:
        """The factor of an optimiser step."""
        if self.since is None:
            return 1.0
        recovered = (step - self.since - self.hold_steps) / self.recovery_steps
        return self.lowest ** (1 - min(1.0, max(0.0, recovered)))

    def alarm(self, step: int) -> bool:
        """Lower the factor from ``step`` on; not while it holds, when the last alarm has not had time to work.

        Returns:
            Whether the factor fell.
        """
        if self.since is not None and step - self.since < self.hold_steps:
            return False
        self.lowest = min(self.at(step), max(self.min_factor, self.at(step) * self.factor))
        self.since = step
        return True

    def state_dict(self) -> dict[str, Any]:
        """Where it is."""
        return {"lowest": self.lowest, "since": self.since}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        self.lowest, self.since = state_dict["lowest"], state_dict["since"]


class LearningRateBackoff(Callback):
    """Multiply the learning rate by a factor on an alarm, and let it recover slowly.

    The rate is scaled only while the optimiser steps, so every scheduler sees the rates that it set itself: both
    multiply. Alarms while the rate is held down change nothing. Logs ``train/learning_rate_factor`` every step.

    A ``CollapseDetector`` calls ``act``; so can any other code.

    Args:
        factor: what an alarm multiplies the present rate by, between 0 and 1.
        hold_steps: optimiser steps at the lowest rate.
        recovery_steps: optimiser steps after that until the whole rate is back.
        min_factor: share of the learning rate that repeated alarms leave at least.
        level: lowest level of alarms to act on: 1 or 2.

    Raises:
        ValueError: if an option is out of its range.

    Example::

        trainer = Trainer(callbacks=[CollapseDetector(actions=[LearningRateBackoff(factor=0.1)])])
    """

    def __init__(
        self,
        factor: float = 0.1,
        hold_steps: int = 200,
        recovery_steps: int = 1000,
        min_factor: float = 1e-3,
        level: Literal[1, 2] = 2,
    ) -> None:
        if not 0 < factor < 1 or not 0 < min_factor <= 1:
            raise ValueError(f"`factor` ({factor}) and `min_factor` ({min_factor}) must lie between 0 and 1.")
        if hold_steps < 1 or recovery_steps < 1:
            raise ValueError(f"`hold_steps` ({hold_steps}) and `recovery_steps` ({recovery_steps}) must be at least 1.")
        self.backoff = Backoff(factor, hold_steps, recovery_steps, min_factor)
        self.level = level
        self._handles: list[RemovableHandle] = []
        self._own_rates: dict[Optimizer, list[Any]] = {}

    def act(self, alarm: Alarm, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lower the learning rate from the next optimiser step on."""
        if alarm.level >= self.level:
            self.backoff.alarm(trainer.global_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scale the rates around each optimiser step."""
        self._remove_hooks()

        def before(optimizer: Optimizer, *arguments: Any) -> None:
            factor = self.backoff.at(trainer.global_step)
            if factor != 1:
                self._scale(optimizer, factor)

        def after(optimizer: Optimizer, *arguments: Any) -> None:
            self._restore(optimizer)

        for optimizer in trainer.optimizers:
            self._handles += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the factor."""
        pl_module.log("train/learning_rate_factor", self.backoff.at(trainer.global_step))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the rates as the scheduler set them, also in the middle of a step."""
        for optimizer in list(self._own_rates):
            self._restore(optimizer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimisers."""
        self._remove_hooks()

    def state_dict(self) -> dict[str, Any]:
        """Where the factor is."""
        return self.backoff.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.backoff.load_state_dict(state_dict)

    def _scale(self, optimizer: Optimizer, factor: float) -> None:
        rates = [group["lr"] for group in optimizer.param_groups]
        self._own_rates[optimizer] = [rate.clone() if isinstance(rate, torch.Tensor) else rate for rate in rates]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            _set_rate(group, rate * factor)

    def _restore(self, optimizer: Optimizer) -> None:
        for group, rate in zip(optimizer.param_groups, self._own_rates.pop(optimizer, ()), strict=False):
            _set_rate(group, rate)

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _set_rate(group: dict[str, Any], rate: Any) -> None:
    """Set a group's rate; a tensor stays the same one, which compiled steps hold on to."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].copy_(rate)
    else:
        group["lr"] = rate
