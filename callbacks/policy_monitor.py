"""Measure what a policy's updates do to its entropy: covariances, quadrants, clips, phases, lengths, solutions."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from litropy.callbacks.collapse_readings import Readings
from litropy.callbacks.policy_readings import PolicyReadings, publisher
from litropy.callbacks.policy_statistics import (
    clip_shares,
    covariance_quantiles,
    masked_quantiles,
    phase_entropies,
    quadrant_shares,
    solution_counts,
)

__all__ = ["PolicyMonitor"]


class PolicyMonitor(Callback):
    r"""Measure a policy that learns from rewards: why its entropy moves, and what it still finds.

    Of each batch of responses, over all ranks, it logs

    - ``covariance/mean``, of log-probability and advantage over tokens: above 0 it lowers the entropy;
      ``covariance/median``, ``top_20``, ``top_2`` and ``top_0p2``: what the product exceeds in that share of tokens;
    - ``quadrant/likely_up``, ``unlikely_up``, ``likely_down``, ``unlikely_down``: shares of the tokens by the sign of
      their advantage and by whether :math:`-\ln \pi < H`; likely up and unlikely down lower the entropy;
    - ``clip/high`` and ``clip/low``: shares of the tokens that lose their gradient to the clip, by the side;
    - ``length/median``, ``length/p90``, ``length/max``, and ``length/right`` and ``length/wrong``, means over right and
      wrong responses [tokens]; 0 if there are none;
    - ``entropy/thinking`` and ``entropy/answer`` [nats] with a ``marker``;
    - ``solutions/effective`` and ``solutions/distinct``, mean numbers of different right answers to a prompt that has
      any: exp of the answers' entropy, and a plain count.

    Means over optimiser steps where a batch has several. ``CollapseDetector`` reads the policy's entropy from here.

    Args:
        marker: tokens that end thinking; ``</think>`` is [151668] in Qwen3. None does not tell phases apart.

    Raises:
        ValueError: if ``marker`` is empty; when training starts, if the module is no policy that can be watched.

    Example::

        trainer = Trainer(callbacks=[PolicyMonitor(), CollapseDetector()])

    Reference: "The Entropy Mechanism of RL for Reasoning LLMs" (arXiv 2505.22617), table 1 (covariance); PEAR
    (arXiv 2510.08026), phases; CE-GPPO (arXiv 2509.20712), quadrants.
    """

    def __init__(self, marker: list[int] | None = None) -> None:
        if marker is not None and not marker:
            raise ValueError("`marker` is empty; give the tokens that end thinking, such as [151668], or null.")
        self.marker = marker
        self._seen: PolicyReadings | None = None
        self._readings: Readings | None = None

    def collapse_readings(self) -> Readings | None:
        """Return the latest entropy, for ``CollapseDetector``."""
        return self._readings

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse modules that cannot be watched."""
        publisher(pl_module, self)
        self._seen = self._readings = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure the batch, if it had responses."""
        found = publisher(pl_module, self).policy_readings()
        if found is None or found is self._seen:
            return
        self._seen = found
        mean = torch.where(found.mask, found.entropy, 0).sum() / found.mask.sum().clamp(min=1)
        if self._readings is None or found.step > self._readings.step:
            self._readings = Readings(found.step, {"output/entropy": mean})
        values = _of_updates(found) | _lengths(found) | self._phases(found)
        sums = torch.tensor(solution_counts(found.samples), device=pl_module.device)
        effective, distinct, prompts = trainer.strategy.reduce(sums, reduce_op="sum").unbind()
        values["solutions/effective"] = effective / prompts.clamp(min=1)
        values["solutions/distinct"] = distinct / prompts.clamp(min=1)
        pl_module.log_dict(values)

    def _phases(self, found: PolicyReadings) -> dict[str, Tensor]:
        if self.marker is None:
            return {}
        phases = phase_entropies(found.responses, found.mask, found.entropy, self.marker)
        return {f"entropy/{name}": value for name, value in phases.items()}


def _of_updates(found: PolicyReadings) -> dict[str, Tensor]:
    """Means over the optimiser steps."""
    each: list[dict[str, Tensor]] = []
    for update in found.updates:
        groups = {
            "covariance": covariance_quantiles(update),
            "quadrant": quadrant_shares(update),
            "clip": clip_shares(update),
        }
        each.append({f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()})
    return {name: torch.stack([values[name] for values in each]).mean() for name in (each[0] if each else ())}


def _lengths(found: PolicyReadings) -> dict[str, Tensor]:
    lengths = found.mask.sum(-1).float()
    quantiles = masked_quantiles(lengths, torch.ones_like(found.correct), [0.5, 0.9, 1.0])
    values = dict(zip(("median", "p90", "max"), quantiles, strict=True))
    for name, rows in (("right", found.correct), ("wrong", ~found.correct)):
        values[name] = torch.where(rows, lengths, 0).sum() / rows.sum().clamp(min=1)
    return {f"length/{name}": value for name, value in values.items()}
