"""Raise an alarm when attention, outputs or representations collapse, and let remedies act."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from litropy.callbacks.collapse_alarm import CRITICAL, Alarm
from litropy.callbacks.collapse_gradients import gradient_over_epsilon
from litropy.callbacks.collapse_inbox import Inbox
from litropy.callbacks.collapse_judge import RULES, CollapseJudge
from litropy.callbacks.collapse_readings import PublishesReadings, Readings
from litropy.callbacks.recovery import recovery_actions

__all__ = ["CollapseAction", "CollapseDetector"]


class CollapseAction(ABC):
    """Base of remedies, which act on an alarm; a callback need not derive from it, only have the method.

    One that is no callback may have ``state_dict`` and ``load_state_dict``: the detector keeps its state.
    """

    @abstractmethod
    def act(self, alarm: Alarm, trainer: Trainer, pl_module: LightningModule) -> None:
        """React to a new alarm, between two optimiser steps, at the same step on every rank."""


class CollapseDetector(Callback):
    """Warn when a model begins to collapse, and say so when it has.

    Reads what the monitors among the trainer's callbacks measure (``AttentionEntropyMonitor``,
    ``RepresentationCollapseMonitor``, ``OutputEntropyMonitor``: any callback with ``collapse_readings``, in any order),
    the loss of each step, and the gradients. Logs ``collapse/alarm`` every step: 0 fine, 1 warning, 2 critical, as it
    is now. Alarms are kept in ``alarms``; each is a record of step, level, rule, layer, head and a message. The rules:

    - ``attention_entropy``: a layer's entropy has fallen and its logits have grown (1); it has collapsed, and the loss
      improves more slowly than before (2);
    - ``attention_collapse`` (2): half of all heads have come to look at one key, at logits over 100;
    - ``sharp_attention`` (1): half of a layer's heads look at one key, at logits over 100, also from the start;
    - ``logit_growth`` (1): a head's largest logit doubles within 23 steps or sooner;
    - ``attention_drift`` (1): entropy drifts down slowly while logits drift up;
    - ``representation_rank``: all tokens have become the same vector (1), and the loss stalls (2);
    - ``output_entropy``: outputs are far more certain than right, or (without targets) than they were (1); hardly any
      entropy is left (2, without targets);
    - ``gradient_floor`` (1): gradients as small as the optimiser's epsilon;
    - ``loss_spike``: the loss jumps (1) or is not finite (2).

    A warning is a reason to look, as models that work also sharpen; what makes it critical is that learning suffers.

    Nothing waits for the device at every step: every ``every_n_steps`` the numbers of the steps before are copied while
    the next step runs, and the rules see them when it ends. Every rank decides the same; the state is in the
    checkpoint.

    Args:
        loss: logged metric to take as the loss; None takes what ``training_step`` returns.
        every_n_steps: optimiser steps from one decision to the next; monitors may measure more often.
        entropy_fall: share of a layer's highest attention entropy so far at which it counts as fallen, from 0 to 1.
        max_logit: attention logit under which growing logits are no reason to warn.
        loss_share: share of the earlier rate of improvement under which the loss counts as stalled, from 0 to 1.
        ignore: names of rules that never fire, such as ``output_entropy`` where overfitting is intended.
        actions: remedies, called with every new alarm; those that are callbacks join the trainer's. ``recovery`` takes
            ``recovery_actions()``, the sequence that brings a collapsed run back.

    Raises:
        ValueError: if a number is out of its range, a rule or the metric ``loss`` is unknown, or an action cannot act.

    Example::

        trainer = Trainer(callbacks=[AttentionEntropyMonitor(), CollapseDetector()])
    """

    def __init__(
        self,
        loss: str | None = None,
        every_n_steps: int = 10,
        entropy_fall: float = 0.5,
        max_logit: float = 30.0,
        loss_share: float = 0.4,
        ignore: list[str] | None = None,
        actions: list[CollapseAction | Callback] | Literal["recovery"] | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"`every_n_steps` is {every_n_steps}; it must be at least 1.")
        for name, share in (("entropy_fall", entropy_fall), ("loss_share", loss_share)):
            if not 0 <= share <= 1:
                raise ValueError(f"`{name}` is {share}; it is a share, from 0 to 1.")
        unknown = [rule for rule in ignore or [] if rule not in RULES]
        if unknown:
            raise ValueError(f"`ignore` has {', '.join(map(repr, unknown))}; the rules are {', '.join(RULES)}.")
        remedies: list[Any] = [*recovery_actions()] if actions == "recovery" else list(actions or [])
        for action in remedies:
            if not hasattr(action, "act"):
                raise ValueError(
                    f"`actions` has a {type(action).__name__}, which has no `act(alarm, trainer, pl_module)`."
                )
        self.loss = loss
        self.every_n_steps = every_n_steps
        self.actions = remedies
        self._options: dict[str, Any] = {
            "entropy_fall": entropy_fall,
            "max_logit": max_logit,
            "loss_share": loss_share,
            "ignore": ignore or [],
        }
        self._monitors: list[PublishesReadings] = []
        self._names: dict[int, str] = {}
        self._levels: list[Tensor] = []
        self._forget()

    def _forget(self) -> None:
        self.judge = CollapseJudge(**self._options)
        self._inbox = Inbox()
        self._read: dict[int, int] = {}
        self._last_step = -1
        self._step = 0
        self._window: list[Tensor] = []
        self._gradients: dict[str, Tensor] = {}

    @property
    def alarms(self) -> list[Alarm]:
        """All alarms so far, the oldest first."""
        return self.judge.book.alarms

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let remedies that are callbacks take part in training."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for action in self.actions:
            if isinstance(action, Callback) and action not in callbacks:
                callbacks.insert(callbacks.index(self) + 1, action)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the monitors; forget an earlier fit that this one does not continue."""
        if self._last_step >= trainer.global_step:
            self._forget()
        self._window, self._gradients, self._read = [], {}, {}
        self._monitors = [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, PublishesReadings)
        ]
        # gradients of reparametrised weights are as small as the weights are large, which says nothing of learning
        self._names = {
            id(p): name for name, p in pl_module.named_parameters() if ".parametrizations." not in f".{name}"
        }
        # on the device already, so that logging one copies nothing
        self._levels = list(torch.arange(3.0, device=pl_module.device).unbind())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Collect what the monitors measured in the last step, and send it on its way if a decision is due."""
        self._step = trainer.global_step
        self._collect()
        if self._due and not self._window:
            self._inbox.send(pl_module.device)

    @property
    def _due(self) -> bool:
        return self._step % self.every_n_steps == 0

    def _collect(self) -> None:
        for index, monitor in enumerate(self._monitors):
            readings = monitor.collapse_readings()
            if readings is not None and readings.step > self._read.get(index, -1):
                self._read[index] = readings.step
                self._inbox.add(readings)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure the gradients."""
        if self._due:
            self._gradients |= gradient_over_epsilon(optimizer, self._names)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss, decide on the numbers that have arrived, and log the level."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._window.append(loss.detach())
        if trainer.global_step != self._step:
            self._end_step(trainer)
        self._decide(trainer, pl_module)
        pl_module.log("collapse/alarm", self._levels[self.judge.level])

    def _end_step(self, trainer: Trainer) -> None:
        """Put the numbers of a complete optimiser step into the inbox."""
        window, self._window = self._window, []
        if self.loss is not None:
            window = [self._metric(trainer)]
        elif window:
            # Lightning has divided each micro-batch's loss by the size of a full window
            window = [torch.stack(window).mean() * trainer.accumulate_grad_batches]
        # every rank notes every step, so that the ranks' lists match
        self._inbox.add_loss(self._step, window[0] if window else None)
        if self._gradients:
            values = {"gradient/rms_over_eps": torch.stack(list(self._gradients.values()))}
            self._inbox.add(Readings(self._step, values, tuple(self._gradients)))
            self._gradients = {}
        self._last_step = self._step

    def _metric(self, trainer: Trainer) -> Tensor:
        assert self.loss is not None
        if self.loss not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise ValueError(f"`loss` is {self.loss!r}, which was not logged; this step logged: {logged}.")
        return trainer.callback_metrics[self.loss].detach()

    def _decide(self, trainer: Trainer, pl_module: LightningModule, act: bool = True) -> None:
        for arrived in self._inbox.receive():
            if arrived.loss is not None:
                alarms = self.judge.observe_loss(arrived.step, arrived.loss)
            else:
                alarms = self.judge.observe(arrived.step, arrived.values, arrived.layers)
            for alarm in alarms:
                self._announce(alarm)
                for action in self.actions if act else []:
                    action.act(alarm, trainer, pl_module)

    def _announce(self, alarm: Alarm) -> None:
        earlier = [other for other in self.alarms if (other.rule, other.level) == (alarm.rule, alarm.level)]
        # a collapse goes through all layers, which need not fill the screen
        if earlier[0] is alarm:
            word = "Collapse" if alarm.level == CRITICAL else "Possible collapse"
            rank_zero_warn(f"{word} at step {alarm.step} ({alarm.rule}): {alarm.message}.")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide on the last steps, too late for remedies."""
        self._collect()
        for _ in range(2):  # what is on its way, and what has come since
            self._decide(trainer, pl_module, act=False)
            self._inbox.send(pl_module.device)

    def state_dict(self) -> dict[str, Any]:
        """Rules, alarms, numbers on their way, and the state of remedies that are no callbacks."""
        self._collect()
        return {
            "judge": self.judge.state_dict(),
            "inbox": self._inbox.state_dict(),
            "last_step": self._last_step,
            "actions": [action.state_dict() for action in self._plain_actions()],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        self.judge.load_state_dict(state_dict["judge"])
        self._inbox.load_state_dict(state_dict["inbox"])
        self._last_step = state_dict["last_step"]
        for action, state in zip(self._plain_actions(), state_dict["actions"], strict=False):
            action.load_state_dict(state)

    def _plain_actions(self) -> list[Any]:
        return [a for a in self.actions if not isinstance(a, Callback) and hasattr(a, "state_dict")]
