"""Penalties on attention entropy: a band around learned thresholds with a floor, and the form that was released.

Shape key: L layers, H heads of a layer, N heads of all layers, S sequences, R rows.
"""

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["BandOfMeans", "BandOfRows", "EntropyPenalty", "RowEntropies", "band_excess", "hard_excess"]


class RowEntropies(NamedTuple):
    """Entropies of one layer's attention rows.

    Attributes:
        entropy: [S, H, R], in nats.
        share: the same over the logarithm of the keys that a row sees, from 0 to 1.
        counted: rows that mean anything, bool [S, H, R].
        num_keys: keys of the call.
        num_rows: rows of each sequence, sampled or not.
    """

    entropy: Tensor
    share: Tensor
    counted: Tensor
    num_keys: int
    num_rows: int


class EntropyPenalty(Protocol):
    """A penalty whose strength is settled once a step."""

    def begins(self, layer: str) -> bool:
        """Whether a layer is pulled in this step; in the first one there is nothing to go by."""

    def term(self, layer: str, rows: RowEntropies) -> Tensor:
        """What a micro-batch adds to the loss."""

    def sums(self, layer: str, rows: RowEntropies) -> Tensor:
        """What the end of the step needs to know, [3, H], to be added up over micro-batches and ranks."""

    def end_step(self, sums: dict[str, Tensor]) -> Tensor:
        """Take the sums of all layers, settle the next step, and return the penalty of this one."""

    def state_dict(self) -> dict[str, Any]:
        """Thresholds, and what the next step needs."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""


def band_excess(entropy: Tensor, threshold: Tensor, margin: float) -> Tensor:
    r"""How far entropies lie outside of a band, :math:`\mathrm{sign}(\delta) (|\delta| - m)_+`.

    Args:
        entropy: H, any shape; :math:`\delta = H - \theta`.
        threshold: centre of the band.
        margin: half its width, m.

    Example::

        >>> band_excess(torch.tensor([0.1, 0.6, 0.9]), torch.tensor(0.5), margin=0.2)
        tensor([-0.2000,  0.0000,  0.2000])
    """
    deviation = entropy - threshold
    return deviation.sign() * (deviation.abs() - margin).clamp_min(0)


def hard_excess(entropy: Tensor, threshold: Tensor, margin: float) -> Tensor:
    r"""How far entropies lie from the centre of a band if they lie outside of it, else 0: it jumps at the margin.

    Args:
        entropy: any shape.
        threshold: centre of the band.
        margin: half its width.

    Example::

        >>> hard_excess(torch.tensor([0.1, 0.4, 0.9]), torch.tensor(0.5), margin=0.2)
        tensor([-0.4000,  0.0000,  0.4000])
    """
    deviation = entropy - threshold
    return torch.where(deviation.abs() > margin, deviation, 0.0)


class BandOfMeans:
    r"""A penalty on the mean normalised entropies of heads, of all rows of a step.

    :math:`P = \frac{\lambda}{N} \sum_h (|H_h - \theta_h| - m)_+^2 + \mu \sum_h (f - H_h)_+^2`. Its derivative at the
    means of one step is the force on the heads in the next, so the gradient is a plain mean over rows, which does not
    depend on how they are divided. Thresholds follow P's gradient.

    Args:
        weight: of the band, lambda; a mean over heads.
        margin: half width of the band, m.
        floor: entropy below which the second term acts, f.
        floor_weight: its weight, mu; a sum, so that a head is held no less in a larger model.
        threshold: where thresholds begin.
        threshold_rate: share of what is outside of the band by which thresholds follow in a step.

    Example::

        >>> penalty = BandOfMeans(1.0, 0.2, floor=0.3, floor_weight=1.0, threshold=0.5, threshold_rate=0.5)
        >>> sums = torch.tensor([[0.2, 1.0], [2.0, 2.0], [0.0, 0.0]])  # of two rows: means 0.1 and 0.5
        >>> round(float(penalty.end_step({"layer": sums})), 3)
        0.06
        >>> penalty.thresholds["layer"], penalty.forces["layer"]
        (tensor([0.4000, 0.5000]), tensor([-0.5000, 0.0000]))
    """

    def __init__(
        self, weight: float, margin: float, floor: float, floor_weight: float, threshold: float, threshold_rate: float
    ) -> None:
        self.weight = weight
        self.margin = margin
        self.floor = floor
        self.floor_weight = floor_weight
        self.threshold = threshold
        self.threshold_rate = threshold_rate
        self.thresholds: dict[str, Tensor] = {}
        self.forces: dict[str, Tensor] = {}

    def begins(self, layer: str) -> bool:
        """Whether a layer is pulled in this step."""
        return layer in self.forces

    def term(self, layer: str, rows: RowEntropies) -> Tensor:
        """Heads' mean entropies times their forces."""
        total = torch.where(rows.counted, rows.share, 0).sum((0, 2))
        number = rows.counted.sum((0, 2)).clamp_min(1)
        return (self.forces[layer].to(total.device) * total / number).sum()

    def sums(self, layer: str, rows: RowEntropies) -> Tensor:
        """Sums of entropies, and numbers of rows."""
        total = torch.where(rows.counted, rows.share.detach(), 0).sum((0, 2)).float()
        return torch.stack([total, rows.counted.sum((0, 2)).float(), torch.zeros_like(total)])

    def end_step(self, sums: dict[str, Tensor]) -> Tensor:
        """Move thresholds, and settle the forces of the next step."""
        heads = [layer_sums.shape[1] for layer_sums in sums.values()]
        total, number, _ = torch.cat(list(sums.values()), 1)
        entropy = total / number
        initial = torch.full_like(entropy, self.threshold)
        known = [
            self.thresholds[layer].to(part) if layer in self.thresholds else part
            for layer, part in zip(sums, initial.split(heads), strict=True)
        ]
        threshold = torch.cat(known)
        band, below = self._parts(entropy, threshold)
        penalty = self.weight * band.square().mean() + self.floor_weight * below.square().sum()
        threshold = (threshold + self.threshold_rate * band).clamp(0, 1)
        band, below = self._parts(entropy, threshold)
        forces = 2 * self.weight * band / len(entropy) - 2 * self.floor_weight * below
        self.thresholds = dict(zip(sums, threshold.split(heads), strict=True))
        self.forces = dict(zip(sums, forces.split(heads), strict=True))
        return penalty

    def _parts(self, entropy: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """What is outside of the band, and what is missing to the floor; 0 for heads without rows."""
        band, below = band_excess(entropy, threshold, self.margin), (self.floor - entropy).clamp_min(0)
        return band.nan_to_num(0.0), below.nan_to_num(0.0)

    def state_dict(self) -> dict[str, Any]:
        """Thresholds and forces."""
        return {"thresholds": self.thresholds, "forces": self.forces}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        self.thresholds, self.forces = dict(state_dict["thresholds"]), dict(state_dict["forces"])


class BandOfRows:
    r"""The penalty of the authors' code: each row for itself, and thresholds that all layers share.

    :math:`P = \lambda \frac{1}{L H} \sum_{l,h} \sum_i \delta_{lhi}^2 [|\delta_{lhi}| > m \ln T]` with
    :math:`\delta_{lhi} = H_{lhi} - \theta_h \ln T` in nats, summed over rows i of all sequences.

    Args:
        weight: lambda.
        margin: half width of the band as a share of ln T, m.
        threshold: where thresholds begin, as a share of ln T.
        threshold_rate: share of the mean of what is outside of the band by which thresholds follow in a step.
    """

    def __init__(self, weight: float, margin: float, threshold: float, threshold_rate: float) -> None:
        self.weight = weight
        self.margin = margin
        self.threshold = threshold
        self.threshold_rate = threshold_rate
        self.thresholds: Tensor | None = None
        self.num_layers = 0

    def begins(self, layer: str) -> bool:
        """Whether a layer is pulled in this step."""
        return self.num_layers > 0

    def _outside(self, rows: RowEntropies) -> Tensor:
        longest, heads = math.log(max(2, rows.num_keys)), rows.entropy.shape[1]
        threshold = torch.full((heads,), self.threshold) if self.thresholds is None else self.thresholds
        threshold = threshold.to(rows.entropy.device)[:, None] * longest
        return hard_excess(rows.entropy, threshold, self.margin * longest)

    def _squares(self, outside: Tensor, rows: RowEntropies) -> Tensor:
        _, heads, sampled = outside.shape
        return self.weight / heads * rows.num_rows / sampled * outside.square().sum((0, 2))

    def term(self, layer: str, rows: RowEntropies) -> Tensor:
        """The penalty of these rows."""
        return self._squares(self._outside(rows), rows).sum() / self.num_layers

    def sums(self, layer: str, rows: RowEntropies) -> Tensor:
        """Sums of what lies outside of the band over ln T, numbers of rows, and penalties."""
        outside = self._outside(rows).detach()
        longest, number = math.log(max(2, rows.num_keys)), outside[:, 0].numel()
        share = outside.sum((0, 2)).float() / longest
        return torch.stack([share, torch.full_like(share, number), self._squares(outside, rows).float()])

    def end_step(self, sums: dict[str, Tensor]) -> Tensor:
        """Move the thresholds."""
        if len({layer_sums.shape[1] for layer_sums in sums.values()}) > 1:
            raise ValueError("`released=True` shares thresholds between layers, but layers differ in their heads.")
        self.num_layers = len(sums)
        outside, number, squares = torch.stack(list(sums.values()), 1)
        before = torch.full_like(outside[0], self.threshold) if self.thresholds is None else self.thresholds
        self.thresholds = (before.to(outside) + self.threshold_rate * (outside / number).mean(0)).clamp(0, 1)
        return squares.sum() / self.num_layers

    def state_dict(self) -> dict[str, Any]:
        """Thresholds, and the number of layers."""
        return {"thresholds": self.thresholds, "num_layers": self.num_layers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        self.thresholds, self.num_layers = state_dict["thresholds"], state_dict["num_layers"]
