"""Have the optimiser forget its moments, which a collapse leaves stale."""

import re
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import LBFGS, Adagrad, Optimizer
from torch.utils.hooks import RemovableHandle

from litropy.callbacks.collapse_alarm import Alarm

__all__ = ["ResetMoments", "reset_moments"]


def reset_moments(module: nn.Module, optimizers: list[Optimizer], names: list[str] | None = None) -> int:
    """Drop what optimisers know of parameters: they treat them as at their very first step.

    The count of steps starts again too, so that the bias correction of Adam fits its new moments: without that, the
    next update would be (1 - beta1) / sqrt(1 - beta2) times as large as usual.

    Args:
        module: the model, whose parameters have the names.
        optimizers: as torch makes them; parameters may be sharded.
        names: regular expressions, searched in the parameters' names; None takes all.

    Returns:
        How many parameters were reset.

    Raises:
        ValueError: if a pattern matches no parameter of an optimiser, or an optimiser cannot begin anew.

    Example::

        >>> layer = nn.Linear(2, 1)
        >>> adam = torch.optim.Adam(layer.parameters())
        >>> layer(torch.ones(2)).backward()
        >>> adam.step()
        >>> reset_moments(layer, [adam], ["bias"]), len(adam.state)
        (1, 1)
    """
    chosen = _choose(module, optimizers, names)
    for optimizer, parameter in chosen:
        optimizer.state.pop(parameter, None)
    return len(chosen)


def _choose(
    module: nn.Module, optimizers: list[Optimizer], names: list[str] | None
) -> list[tuple[Optimizer, nn.Parameter]]:
    """Find the parameters that are meant, each with its optimiser."""
    named = {id(parameter): name for name, parameter in module.named_parameters()}
    unused = set(names or ())
    chosen = []
    for optimizer in optimizers:
        if isinstance(optimizer, Adagrad | LBFGS):
            kind = type(optimizer).__name__
            raise ValueError(
                f"{kind} cannot forget the past of single parameters; use an optimiser with moments (Adam)."
            )
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            name = named.get(id(parameter), "")
            matching = {pattern for pattern in names or () if re.search(pattern, name)}
            unused -= matching
            if matching or names is None:
                chosen.append((optimizer, parameter))
    if unused:
        some = ", ".join(list(named.values())[:8])
        raise ValueError(f"`{sorted(unused)[0]}` matches no parameter of the optimiser. There are: {some} ...")
    return chosen


class ResetMoments(Callback):
    """Reset the optimiser's moments of all or some parameters on an alarm, and every so many steps if asked.

    After a collapse the second moments hold the huge gradients of the collapse, and the first ones still point into it.

    A ``CollapseDetector`` calls ``act``; so can any other code.

    Args:
        names: regular expressions, searched in names of parameters such as ``model.layers.0.self_attn.q_proj.weight``;
            None takes all.
        every_n_steps: also reset whenever this many optimiser steps are done; None never does.
        level: lowest level of alarms to act on: 1 or 2.

    Raises:
        ValueError: if ``every_n_steps`` is not positive; when training starts, if a pattern matches nothing or the
            optimiser cannot begin anew (Adagrad, LBFGS).

    Example::

        trainer = Trainer(callbacks=[CollapseDetector(actions=[ResetMoments(names=["q_proj", "k_proj"])])])

    Reference: Huang et al. 2025, "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training", section 3.
    """

    def __init__(
        self, names: list[str] | None = None, every_n_steps: int | None = None, level: Literal[1, 2] = 2
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"`every_n_steps` is {every_n_steps}; it must be at least 1, or None for alarms only.")
        self.names = names
        self.every_n_steps = every_n_steps
        self.level = level
        self._pending = False
        self._handles: list[RemovableHandle] = []

    def act(self, alarm: Alarm, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset before the next optimiser step."""
        self._pending = self._pending or alarm.level >= self.level

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See now, and not at an alarm, that the names are right."""
        _choose(pl_module, trainer.optimizers, self.names)

        def before_step(*arguments: Any) -> None:
            step = trainer.global_step
            if self._pending or (self.every_n_steps and step and step % self.every_n_steps == 0):
                reset_moments(pl_module, trainer.optimizers, self.names)
                self._pending = False

        # right before the step that makes new moments: sharded checkpoints want those of all parameters
        self._remove_hooks()
        self._handles = [optimizer.register_step_pre_hook(before_step) for optimizer in trainer.optimizers]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimisers."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def state_key(self) -> str:
        """One state for each choice of parameters."""
        return self._generate_state_key(names=self.names)

    def state_dict(self) -> dict[str, Any]:
        """Whether an alarm waits for the next step."""
        return {"pending": self._pending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._pending = state_dict["pending"]
