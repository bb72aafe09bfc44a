"""Rules about representations, outputs, gradients and the loss: what attention entropy cannot see."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from litropy.callbacks.collapse_alarm import CRITICAL, WARN, Finding
from litropy.callbacks.collapse_baseline import Drift, Hold
from litropy.callbacks.collapse_loss import LossHistory, SpikeRule
from litropy.callbacks.collapse_state import PlainState

__all__ = ["GradientFloor", "LossSpike", "OutputEntropy", "RepresentationRank"]


class RepresentationRank(PlainState):
    """All tokens have become the same vector (warning); the loss no longer falls (critical).

    The uncentred effective rank of a layer's output is under 1.5 and the mean cosine between tokens above 0.9, for
    three probes and ten steps; critical after 30 steps, once the loss improves at less than its share of the earlier
    rate, and after 100 if it does not improve faster than before.
    Healthy runs pass through a high cosine in their first steps, but their rank stays above.
    """

    name = "representation_rank"
    saved = ("hold", "critical")
    rank, cosine, patience, longest = 1.5, 0.9, 30, 100

    def __init__(self) -> None:
        self.hold = Hold(probes=3, steps=10)
        self.critical: Any = None

    def update(
        self, step: int, layers: Sequence[int | str], rank: np.ndarray, cosine: np.ndarray, loss: LossHistory
    ) -> list[Finding]:
        """Take one probe, [L] each; return what is so now."""
        if self.critical is None:
            self.critical = np.zeros(len(rank), dtype=bool)
        active = self.hold.update(step, (rank < self.rank) & (cosine > self.cosine))
        self.critical &= active
        found = []
        for index in np.flatnonzero(active).tolist():
            since = self.hold.since[index]
            trend = loss.trend(since)
            stalled = trend.verdict == "stalled" and step - since >= self.patience
            self.critical[index] |= stalled or (trend.verdict == "unknown" and step - since >= self.longest)
            level = CRITICAL if self.critical[index] else WARN
            why = (
                f"the tokens in layer {layers[index]} have been nearly the same vector since step {since:.0f}:"
                f" effective rank {rank[index]:.2f}, mean cosine {cosine[index]:.3f}"
            )
            if level == CRITICAL:
                why += ", and the loss does not improve as before"
            found.append(Finding(self.name, level, layers[index], None, why))
        return found


class OutputEntropy(PlainState):
    """The output distribution is more certain than it may be (warning), or nothing is left of its entropy (critical).

    With a cross-entropy of the same tokens: the entropy is under half of it for 30 steps (a calibrated model's equals
    it), a warning. Without one, as in reinforcement learning: a quarter of its highest value so far warns, a twentieth
    is critical, and so does a drift upwards from the baseline warn (see ``Drift``).
    """

    name = "output_entropy"
    saved = ("peak", "certain", "gone", "drift", "risen")
    calibrated, fall, nothing, together = 0.5, 0.25, 0.05, 20

    def __init__(self) -> None:
        self.certain = Hold(probes=3, steps=30)
        self.gone = Hold(probes=3, steps=10)
        self.drift = Drift(floor=0.02)
        self.peak = 0.0
        self.risen = -math.inf

    def update(self, step: int, entropy: float, cross_entropy: float | None, loss: LossHistory) -> list[Finding]:
        """Take one probe [nats]; return what is so now."""
        if cross_entropy is not None:
            # both are nearly zero once everything is learned by heart
            over = entropy < self.calibrated * cross_entropy and not loss.learned
            if not self.certain.update(step, [over])[0]:
                return []
            return [self._finding(WARN, f"{entropy:.3g} nats, where the cross-entropy is {cross_entropy:.3g}")]
        self.peak = max(self.peak, entropy)
        moved = self.drift.update(step, [math.log(max(entropy, 1e-6))])
        self.risen = self.drift.blocks if moved[0] > 0 else self.risen
        low = self.certain.update(step, [entropy <= self.fall * self.peak])[0]
        gone = self.gone.update(step, [entropy <= self.nothing * self.peak])[0]
        if gone or low:
            return [self._finding(CRITICAL if gone else WARN, f"{entropy:.3g} nats, down from {self.peak:.3g}")]
        if self.drift.blocks - self.risen <= self.together:
            return [self._finding(WARN, f"{entropy:.3g} nats and drifts upwards")]
        return []

    def _finding(self, level: int, what: str) -> Finding:
        return Finding(self.name, level, None, None, f"the entropy of the output is {what}")


class GradientFloor(PlainState):
    r"""Gradients so small that the optimiser's epsilon swallows them (warning).

    :math:`\mathrm{RMS}(g) / \epsilon < 10` for a tenth of the weight matrices, for three probes and ten steps.
    Gradients that are exactly zero are left out (frozen or unused weights), the detector gives none of reparametrised
    weights (``SigmaReparam``), whose gradients are as small as they are large, and nothing warns once the loss is under
    5 % of that of the first steps.
    """

    name = "gradient_floor"
    saved = ("hold",)
    ratio, share = 10.0, 0.1

    def __init__(self) -> None:
        self.hold = Hold(probes=3, steps=10)

    def update(self, step: int, weights: Sequence[int | str], ratio: np.ndarray, loss: LossHistory) -> list[Finding]:
        """Take one probe, RMS(g) / epsilon of each weight matrix [L]; return what is so now."""
        used = ratio > 0
        small = used & (ratio < self.ratio)
        many = small.sum() > self.share * used.sum() and not loss.learned
        if not self.hold.update(step, [many])[0] or not small.any():
            return []
        worst = int(np.argmin(np.where(used, ratio, np.inf)))
        why = (
            f"the gradients of {small.sum()} of {used.sum()} weight matrices are about as small as the optimiser's"
            f" epsilon, down to {ratio[worst]:.2g} times it in {weights[worst]}"
        )
        return [Finding(self.name, WARN, None, None, why)]


class LossSpike(PlainState):
    """A loss that spikes (warning, see ``SpikeRule``) or is not finite (critical)."""

    name = "loss_spike"
    saved = ("spike",)

    def __init__(self) -> None:
        self.spike = SpikeRule()

    def update(self, loss: float) -> list[Finding]:
        """Take the loss of a step; return what is so now."""
        spike = self.spike.update(loss)
        if not math.isfinite(loss):
            return [Finding(self.name, CRITICAL, None, None, f"the loss is {loss}")]
        if spike is None:
            return []
        before, now = spike
        return [Finding(self.name, WARN, None, None, f"the loss jumped from {before:.4g} to {now:.4g}")]
