"""All rules together: numbers in, alarms out; no Trainer and no device."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from litropy.callbacks.collapse_alarm import Alarm, AlarmBook, Finding
from litropy.callbacks.collapse_attention import (
    AttentionCollapse,
    AttentionDrift,
    AttentionFall,
    LogitGrowth,
    SharpAttention,
)
from litropy.callbacks.collapse_loss import LossHistory
from litropy.callbacks.collapse_rules import GradientFloor, LossSpike, OutputEntropy, RepresentationRank
from litropy.callbacks.collapse_state import PlainState

__all__ = ["RULES", "CollapseJudge"]

RULES = (
    AttentionFall.name,
    AttentionCollapse.name,
    SharpAttention.name,
    LogitGrowth.name,
    AttentionDrift.name,
    RepresentationRank.name,
    OutputEntropy.name,
    GradientFloor.name,
    LossSpike.name,
)


class CollapseJudge(PlainState):
    """Turns losses and the monitors' numbers into alarms.

    Args:
        entropy_fall: share of a layer's highest attention entropy at which it counts as fallen.
        max_logit: attention logit below which no rule about growing logits fires.
        loss_share: share of the earlier rate of improvement below which the loss counts as stalled.
        ignore: names of rules that never fire.

    Example::

        >>> judge = CollapseJudge()
        >>> for step in range(60):
        ...     _ = judge.observe_loss(step, max(2.0, 4.0 - 0.1 * step))
        ...     entropy, logit = max(0.05, 0.95 - 0.05 * step), 5.0 * 1.1**step
        ...     values = {"attention/entropy": [[entropy]], "attention/max_logit": [[logit]]}
        ...     for alarm in judge.observe(step, values, layers=(0,)):
        ...         print(alarm.step, alarm.level, alarm.rule)
        23 1 attention_entropy
        24 1 logit_growth
        36 2 attention_collapse
        36 1 sharp_attention
        39 2 attention_entropy
    """

    saved = ("book", "loss", "fall", "collapse", "sharp", "growth", "drift", "rank", "output", "gradient", "spike")

    def __init__(
        self,
        entropy_fall: float = 0.5,
        max_logit: float = 30.0,
        loss_share: float = 0.4,
        ignore: Collection[str] = (),
    ) -> None:
        self.ignore = frozenset(ignore)
        self.book = AlarmBook()
        self.loss = LossHistory(loss_share)
        self.fall = AttentionFall(entropy_fall, max_logit)
        self.collapse = AttentionCollapse()
        self.sharp = SharpAttention()
        self.growth = LogitGrowth(max_logit)
        self.drift = AttentionDrift()
        self.rank = RepresentationRank()
        self.output = OutputEntropy()
        self.gradient = GradientFloor()
        self.spike = LossSpike()

    @property
    def level(self) -> int:
        """The highest level of what is so at present: 0 fine, 1 warning, 2 critical."""
        return self.book.level

    def observe_loss(self, step: int, loss: float) -> list[Alarm]:
        """Take the loss of an optimiser step; return new alarms."""
        self.loss.add(step, loss)
        return self._enter(step, LossSpike.name, self.spike.update(loss))

    def observe(self, step: int, values: Mapping[str, Any], layers: Sequence[int | str]) -> list[Alarm]:
        """Take one probe of one monitor; return new alarms.

        Args:
            step: optimiser step that was measured.
            values: numbers by name, as ``collapse_readings`` lists them.
            layers: index or name of each layer.
        """
        known = {name: np.asarray(value, dtype=float) for name, value in values.items()}
        found: dict[str, list[Finding]] = {}
        if {"attention/entropy", "attention/max_logit"} <= known.keys():
            entropy, logit = known["attention/entropy"], known["attention/max_logit"]
            found[AttentionFall.name] = self.fall.update(step, layers, entropy, logit, self.loss)
            found[AttentionCollapse.name] = self.collapse.update(step, layers, entropy, logit, self.loss)
            found[SharpAttention.name] = self.sharp.update(step, layers, entropy, logit)
            found[LogitGrowth.name] = self.growth.update(step, layers, logit)
            found[AttentionDrift.name] = self.drift.update(step, layers, entropy, logit)
        if {"representation/effective_rank", "representation/mean_cosine"} <= known.keys():
            rank, cosine = known["representation/effective_rank"], known["representation/mean_cosine"]
            found[RepresentationRank.name] = self.rank.update(step, layers, rank, cosine, self.loss)
        if "output/entropy" in known:
            cross = known.get("output/cross_entropy")
            found[OutputEntropy.name] = self.output.update(
                step, float(known["output/entropy"]), None if cross is None else float(cross), self.loss
            )
        if "gradient/rms_over_eps" in known:
            ratio = known["gradient/rms_over_eps"]
            found[GradientFloor.name] = self.gradient.update(step, layers, ratio, self.loss)
        return [alarm for rule, findings in found.items() for alarm in self._enter(step, rule, findings)]

    def _enter(self, step: int, rule: str, findings: list[Finding]) -> list[Alarm]:
        return [] if rule in self.ignore else self.book.update(step, rule, findings)
