"""What a run is measured by, beside the callbacks that are under test: held-out text, with attention materialised.

Shape key: S sequences, T positions, L layers, H heads, D width.
"""

import math
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from collapse_models import HEADS, T, TinyLM
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from litropy.callbacks.collapse_alarm import Alarm
from litropy.callbacks.collapse_loss import SpikeRule

# rows that see fewer keys say little about entropy
_LEAST_KEYS = 8
# normalised entropy of a head that looks at one key, or nearly
ONE_KEY = 0.1
# steps between measurements, and of a mean of training losses
EVERY = 10
# a stall is a gain of less than this share from some steps to as many
_STALL, _LEAST_GAIN = 20, 0.01


class AlarmTimes:
    """An action that notes after how many optimiser steps each alarm is raised: the rules see their numbers later."""

    def __init__(self) -> None:
        self.alarms: list[dict[str, Any]] = []

    def act(self, alarm: Alarm, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note an alarm."""
        self.note(alarm, trainer.global_step)

    def note(self, alarm: Alarm, raised: int) -> None:
        """Note an alarm that is raised after so many steps."""
        self.alarms.append({"raised": raised, **asdict(alarm)})

    def first_of_each_rule(self) -> list[dict[str, Any]]:
        """The first alarm of each rule and level, in the order in which they were raised."""
        first: dict[tuple[str, int], dict[str, Any]] = {}
        for alarm in self.alarms:
            first.setdefault((alarm["rule"], alarm["level"]), alarm)
        return sorted(first.values(), key=lambda alarm: (alarm["raised"], alarm["step"]))


def loss_shows(losses: Sequence[float]) -> int | None:
    """After how many steps the loss alone would tell that something is wrong: not finite, a spike, or a stall.

    Args:
        losses: of each step.

    Returns:
        The number of steps, or None if the loss never tells.
    """
    spike = SpikeRule()
    for done, loss in enumerate(losses, 1):
        now, before = losses[max(0, done - _STALL) : done], losses[max(0, done - 2 * _STALL) : max(0, done - _STALL)]
        stalls = len(before) == _STALL and sum(now) > (1 - _LEAST_GAIN) * sum(before)
        if not math.isfinite(loss) or spike.update(loss) or stalls:
            return done
    return None


def means(values: Sequence[float], number: int) -> list[float]:
    """Means of so many values each; what is left at the end is left out."""
    whole = range(0, len(values) // number * number, number)
    return [round(sum(values[start : start + number]) / number, 4) for start in whole]


@torch.no_grad()
def attention_by_head(module: TinyLM, tokens: Tensor, labels: Tensor) -> dict[str, Any]:
    """Held-out loss, entropy and largest logit of each head [L, H], and effective rank of each layer [L].

    Entropies are means over rows that see 8 keys or more, of ``H / ln n`` in float64.
    """
    queries: dict[str, Tensor] = {}
    hidden: list[Tensor] = []

    def keep(name: str, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        queries[name] = output.unflatten(-1, (HEADS, -1)).transpose(1, 2).double()

    with ExitStack() as hooks:
        for name, part in module.named_modules():
            if name.endswith(("q_proj", "k_proj")):
                hooks.callback(part.register_forward_hook(partial(keep, name)).remove)
            elif re.search(r"\.layers\.\d+$", name):
                hooks.callback(part.register_forward_hook(lambda *call: hidden.append(_tensor(call[-1]))).remove)
        loss = module.loss(tokens, labels)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    keys = torch.arange(1, T + 1).double().log()[_LEAST_KEYS - 1 :]
    entropy, logits = [], []
    for name in queries:
        if name.endswith("q_proj"):
            q, k = queries[name], queries[name.replace("q_proj", "k_proj")]
            scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf)
            rows = torch.special.entr(scores.softmax(-1)).sum(-1)[..., _LEAST_KEYS - 1 :] / keys
            entropy.append(rows.mean((0, 2)))
            logits.append(scores.amax((0, 2, 3)))
    ranks = [_effective_rank(states.flatten(0, 1)) for states in hidden]
    return {"loss": loss.item(), "entropy": torch.stack(entropy), "logit": torch.stack(logits), "rank": ranks}


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _effective_rank(rows: Tensor) -> float:
    """``exp`` of the entropy of the singular values of rows of length 1, not centred."""
    rows = nn.functional.normalize(rows.double(), dim=-1)
    sizes = torch.linalg.eigvalsh(rows.mT @ rows).clamp_min(0).sqrt()
    return float(torch.special.entr(sizes / sizes.sum()).sum().exp())


class Recorder(Callback):
    """Measures a run on held-out text.

    Args:
        held_out: tokens and labels.
        every_n_steps: optimiser steps between two measurements.
    """

    def __init__(self, held_out: tuple[Tensor, Tensor], every_n_steps: int) -> None:
        self.held_out = held_out
        self.every_n_steps = every_n_steps
        self.curves: dict[str, list[float]] = {
            name: [] for name in ("step", "loss", "entropy", "least_entropy", "one_key", "logit", "rank")
        }

    def measure(self, step: int, module: TinyLM) -> None:
        """Take a point of every curve."""
        found = attention_by_head(module, *self.held_out)
        entropy: Tensor = found["entropy"]
        point = {"step": step, "loss": found["loss"], "entropy": entropy.mean(), "least_entropy": entropy.min()}
        point |= {"one_key": (entropy < ONE_KEY).double().mean(), "logit": found["logit"].max()}
        point["rank"] = min(found["rank"])
        for name, value in point.items():
            self.curves[name].append(step if name == "step" else round(float(value), 4))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the beginning."""
        assert isinstance(pl_module, TinyLM)
        self.measure(0, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure where it is due."""
        assert isinstance(pl_module, TinyLM)
        if trainer.global_step % self.every_n_steps == 0:
            self.measure(trainer.global_step, pl_module)
