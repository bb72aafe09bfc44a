"""How monitors hand their numbers to the collapse detector.

A monitor is a callback with a method ``collapse_readings`` that returns its latest probe, or None before the first one.
The detector asks every callback of the trainer that has the method when the next batch starts, so the callbacks' order
does not matter. Values stay on the device until the detector fetches several probes in one copy.

What a monitor promises:

- the values are finished tensors: never changed in place afterwards, equal on every rank (already reduced);
- each probe is a new ``Readings`` with a larger ``step`` than the one before;
- every rank publishes the same names and shapes at the same steps.

Names that the detector knows (others are carried along and ignored); L layers, H query heads, missing heads are NaN:

==================================  ======  ==========================================================================
``attention/entropy``               [L, H]  mean over query rows of H / ln(visible keys), in [0, 1]
``attention/max_logit``             [L, H]  largest attention logit before the softmax, scaled, not soft-capped
``representation/effective_rank``   [L]     of the uncentred rows, from 1
``representation/mean_cosine``      [L]     between two rows, in [-1, 1]
``output/entropy``                  []      mean entropy of the output distribution [nats]
``output/cross_entropy``            []      of the same tokens, if they have targets that the model is trained on [nats]
``gradient/rms_over_eps``           [L]     of a weight matrix's gradient over the optimiser's epsilon; L are weights
==================================  ======  ==========================================================================
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["PublishesReadings", "Readings"]


@dataclass(frozen=True)
class Readings:
    """One probe of one monitor.

    Attributes:
        step: optimiser step that was measured, counted from 0: ``trainer.global_step`` when its batch started.
        values: floating-point tensors by name.
        layers: index or name of each layer, for values that have layers; ``layer`` of an alarm is one of these.
    """

    step: int
    values: Mapping[str, Tensor]
    layers: tuple[int | str, ...] = ()


@runtime_checkable
class PublishesReadings(Protocol):
    """A monitor that the detector listens to."""

    def collapse_readings(self) -> Readings | None:
        """Return the latest probe, the same object until there is a newer one; None before the first."""
