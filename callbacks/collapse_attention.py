"""Rules about attention: entropy that falls while logits grow, and whether the loss pays for it."""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from litropy.callbacks.collapse_alarm import CRITICAL, WARN, Finding
from litropy.callbacks.collapse_baseline import Drift, Hold
from litropy.callbacks.collapse_loss import LossHistory
from litropy.callbacks.collapse_state import PlainState

__all__ = ["AttentionCollapse", "AttentionDrift", "AttentionFall", "LogitGrowth", "SharpAttention"]

Layers = Sequence[int | str]

# normalised entropies of a head that looks at one key, and of one that does not
_ONE_KEY, _NOT_SHARP = 0.1, 0.3
# above the threshold of QK-clip
_ENORMOUS = 100.0


def _num_heads(entropy: np.ndarray) -> np.ndarray:
    return (~np.isnan(entropy)).sum(axis=1)


def _mean(entropy: np.ndarray) -> np.ndarray:
    """Mean over heads, [L]; NaN where there are none."""
    heads = _num_heads(entropy)
    return np.where(heads, np.nansum(entropy, axis=1) / np.maximum(heads, 1), np.nan)


def _sharp(entropy: np.ndarray, max_logit: np.ndarray) -> np.ndarray:
    return (entropy < _ONE_KEY) & (max_logit > _ENORMOUS)


def _worst(values: np.ndarray, sign: int = 1) -> int:
    """Head with the lowest (sign 1) or highest (sign -1) value; heads that a layer does not have are NaN."""
    return int(np.nanargmin(sign * values))


class AttentionFall(PlainState):
    """Entropy falling and logits growing (warning), and the loss not improving as before (critical).

    A layer's entropy is the mean over its heads. It has fallen when it is at most ``entropy_fall`` times its highest
    value so far, which must have been 0.3 or more, and logits have grown when the layer's largest is at least
    ``max_logit`` and four times its smallest value so far. Both together for three probes warn. This becomes critical
    once half of the layer's heads are under 0.1 and the loss improves at less than its share of the rate before. If the
    loss improves faster than before, sharp attention is what the task needs: the present state becomes the new
    reference, and only a further fall warns again.

    Args:
        entropy_fall: share of a layer's highest entropy at which it counts as fallen.
        max_logit: logit below which a layer cannot warn.
    """

    name = "attention_entropy"
    saved = ("peak", "trough", "critical", "fallen", "both")
    growth = 4.0

    def __init__(self, entropy_fall: float, max_logit: float) -> None:
        self.entropy_fall = entropy_fall
        self.max_logit = max_logit
        self.fallen, self.both = Hold(steps=0), Hold()
        self.peak: Any = None
        self.trough: Any = None
        self.critical: Any = None

    def update(
        self, step: int, layers: Layers, entropy: np.ndarray, max_logit: np.ndarray, loss: LossHistory
    ) -> list[Finding]:
        """Take one probe, [L, H] normalised entropies and largest logits; return what is so now."""
        mean, largest = _mean(entropy), np.fmax.reduce(max_logit, axis=1)
        if self.peak is None:
            self.peak, self.trough, self.critical = mean, largest, np.zeros(mean.shape, dtype=bool)
        self.peak, self.trough = np.fmax(self.peak, mean), np.fmin(self.trough, largest)
        fallen = (mean <= self.entropy_fall * self.peak) & (self.peak >= _NOT_SHARP)
        grown = (largest >= self.max_logit) & (largest >= self.growth * self.trough)
        low, active = self.fallen.update(step, fallen), self.both.update(step, fallen & grown)
        self.critical &= active
        collapsed = 2 * (entropy < _ONE_KEY).sum(axis=1) >= _num_heads(entropy)
        found = []
        for index in np.flatnonzero(low | active).tolist():
            trend = loss.trend(self.both.since[index])
            learning = "learning" in (trend.verdict, loss.trend(self.fallen.since[index]).verdict)
            if learning and not self.critical[index]:
                self.peak[index], self.trough[index] = mean[index], largest[index]
                self.fallen.end(index)
                self.both.end(index)
            if not self.both.active[index]:
                continue
            self.critical[index] |= collapsed[index] and trend.verdict == "stalled"
            level = CRITICAL if self.critical[index] else WARN
            why = (
                f"attention entropy of layer {layers[index]} is {mean[index]:.2f} of its maximum, down from"
                f" {self.peak[index]:.2f}, while its largest logit grew from {self.trough[index]:.3g} to"
                f" {largest[index]:.3g}"
            )
            if level == CRITICAL:
                why += f", and the loss now improves by {trend.after:.2g} a step, before by {trend.before:.2g}"
            found.append(Finding(self.name, level, layers[index], _worst(entropy[index]), why))
        return found


class AttentionCollapse(PlainState):
    """Half of all heads have become one-hot at enormous logits (critical).

    Their entropy is under 0.1 and was 0.3 or more, and their largest logit is above 100, for three probes; unless the
    loss improves faster than before they did.
    """

    name = "attention_collapse"
    saved = ("peak", "hold", "raised")
    share = 0.5

    def __init__(self) -> None:
        self.hold = Hold()
        self.raised = False
        self.peak: Any = None

    def update(
        self, step: int, layers: Layers, entropy: np.ndarray, max_logit: np.ndarray, loss: LossHistory
    ) -> list[Finding]:
        """Take one probe, [L, H] each; return what is so now."""
        self.peak = entropy if self.peak is None else np.fmax(self.peak, entropy)
        gone = _sharp(entropy, max_logit) & (self.peak >= _NOT_SHARP)
        heads = _num_heads(entropy).sum()
        if not self.hold.update(step, [gone.sum() >= self.share * heads > 0])[0]:
            self.raised = False
            return []
        if not self.raised and loss.trend(self.hold.since[0]).verdict == "learning":
            self.peak = entropy
            self.hold.end(0)
            return []
        self.raised = True
        why = (
            f"{gone.sum()} of {heads} attention heads have come to look at a single key, at logits up to"
            f" {np.nanmax(max_logit):.3g}"
        )
        return [Finding(self.name, CRITICAL, None, None, why)]


class SharpAttention(PlainState):
    """Attention that is one-hot at enormous logits, however it came to be (warning).

    At least half of a layer's heads have an entropy under 0.1 and a logit above 100, for three probes. Catches runs
    that start sharp, which ``AttentionFall`` cannot judge: they may train well.
    """

    name = "sharp_attention"
    saved = ("hold",)

    def __init__(self) -> None:
        self.hold = Hold()

    def update(self, step: int, layers: Layers, entropy: np.ndarray, max_logit: np.ndarray) -> list[Finding]:
        """Take one probe, [L, H] each; return what is so now."""
        sharp = _sharp(entropy, max_logit)
        heads = _num_heads(entropy)
        active = self.hold.update(step, (2 * sharp.sum(axis=1) >= heads) & (heads > 0))
        return [
            Finding(
                self.name,
                WARN,
                layers[index],
                _worst(entropy[index]),
                f"{sharp[index].sum()} of {heads[index]} heads of layer {layers[index]} look at a single key, at logits"
                f" up to {np.nanmax(max_logit[index]):.3g}",
            )
            for index in np.flatnonzero(active).tolist()
        ]


class LogitGrowth(PlainState):
    r"""A head's largest logit grows exponentially (warning).

    Least-squares slope of :math:`\ln \max s` above 0.03 a step (doubling within 23 steps) over at least 20 steps, and
    the logit is at least ``max_logit``.

    Args:
        max_logit: logit below which a head cannot warn.
    """

    name = "logit_growth"
    saved = ("steps", "logs", "hold")
    span, slope, danger = 20, 0.03, 1e4

    def __init__(self, max_logit: float) -> None:
        self.max_logit = max_logit
        self.hold = Hold()
        self.steps: deque[int] = deque()
        self.logs: deque[Any] = deque()

    def update(self, step: int, layers: Layers, max_logit: np.ndarray) -> list[Finding]:
        """Take one probe, [L, H] largest logits; return what is so now."""
        self.steps.append(step)
        self.logs.append(np.log(np.maximum(max_logit, 1e-6)))
        while len(self.steps) > 3 and step - self.steps[1] >= self.span:
            self.steps.popleft()
            self.logs.popleft()
        if len(self.steps) < 3 or step - self.steps[0] < self.span:
            return []
        time = np.asarray(self.steps, dtype=float)
        time -= time.mean()
        slope = np.tensordot(time, np.stack(self.logs), axes=1) / (time**2).sum()
        growing = (slope > self.slope) & (max_logit >= self.max_logit)
        active = self.hold.update(step, growing.any(axis=1))
        found = []
        for index in np.flatnonzero(active & growing.any(axis=1)).tolist():
            head = _worst(np.where(growing[index], slope[index], np.nan), sign=-1)
            left = math.log(max(self.danger / max_logit[index, head], 1.0)) / slope[index, head]
            why = (
                f"the largest attention logit of layer {layers[index]}, head {head} is {max_logit[index, head]:.3g} and"
                f" doubles every {math.log(2) / slope[index, head]:.0f} steps: 10,000 in {left:.0f} steps"
            )
            found.append(Finding(self.name, WARN, layers[index], head, why))
        return found


class AttentionDrift(PlainState):
    """A slow fall of a layer's entropy together with a slow growth of its logits (warning).

    Both have drifted from their baselines within twenty means of 20 steps: see ``Drift``.
    """

    name = "attention_drift"
    saved = ("entropy", "logit", "fallen", "grown")
    together = 20

    def __init__(self) -> None:
        self.entropy, self.logit = Drift(floor=0.01), Drift(floor=0.05)
        self.fallen: Any = None
        self.grown: Any = None

    def update(self, step: int, layers: Layers, entropy: np.ndarray, max_logit: np.ndarray) -> list[Finding]:
        """Take one probe, [L, H] each; return what is so now."""
        mean, largest = _mean(entropy), np.fmax.reduce(max_logit, axis=1)
        if self.fallen is None:
            self.fallen = self.grown = np.full(len(mean), -np.inf)
        down = np.asarray(self.entropy.update(step, mean)) < 0
        up = np.asarray(self.logit.update(step, np.log(np.maximum(largest, 1e-6)))) > 0
        now = self.entropy.blocks
        self.fallen, self.grown = np.where(down, now, self.fallen), np.where(up, now, self.grown)
        return [
            Finding(
                self.name,
                WARN,
                layers[index],
                _worst(entropy[index]),
                f"attention entropy of layer {layers[index]} drifts down (now {mean[index]:.2f} of its maximum) while"
                f" its logits drift up (now {largest[index]:.3g})",
            )
            for index in np.flatnonzero(now - np.minimum(self.fallen, self.grown) <= self.together).tolist()
        ]
