"""Statistics of every attention layer and head, from the calls of one optimiser step of all ranks.

Shape key: L layers, H query heads (of the layer that has the most), S sequences, R rows.
"""

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from litropy.callbacks.attention_call import AttentionCall
from litropy.callbacks.attention_schedule import sample_rows
from litropy.callbacks.collapse_readings import Readings

__all__ = ["AttentionProbe", "Layers", "ProbeResult"]

# sums over rows that each rank keeps for a head: entropies, largest probabilities, rows, rows that are not finite
_SUMS = 4


@dataclass(frozen=True)
class Layers:
    """The attention layers of a model, the same at every probe and on every rank.

    Attributes:
        paths: of their modules.
        labels: their numbers, or the paths where numbers do not tell them apart.
        heads: how many query heads each has.
    """

    paths: tuple[str, ...]
    labels: tuple[int | str, ...]
    heads: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """How metrics and messages call them."""
        return tuple(f"layer_{label}" if isinstance(label, int) else label for label in self.labels)


@dataclass(frozen=True)
class ProbeResult:
    """One probe, of all ranks, still on the device.

    Attributes:
        step: optimiser step that was measured, from 0.
        layers: the first axis of the values.
        values: [5, L, H]: mean normalised entropy, largest logit before softcap, mean largest probability; rows that
            were counted, and rows among them with a NaN or infinite logit. The first three are NaN where there are such
            rows, or none at all: in heads that a layer does not have.
    """

    step: int
    layers: Layers
    values: Tensor

    def readings(self) -> Readings:
        """What the collapse detector reads."""
        entropy, max_logit, p_max, _, _ = self.values
        values = {"attention/entropy": entropy, "attention/max_logit": max_logit, "attention/p_max": p_max}
        return Readings(self.step, values, self.layers.labels)

    def metrics(self) -> dict[str, Tensor]:
        """Scalars by name, for each layer over its heads."""
        entropy, max_logit, p_max, rows, _ = self.values
        number = torch.tensor(self.layers.heads).to(entropy.device, non_blocking=True)
        missing = torch.arange(entropy.shape[1], device=entropy.device) >= number[:, None]
        mean = entropy.masked_fill(missing, 0).sum(1) / number
        columns = {
            "entropy/attention": mean,
            "entropy/attention_min": entropy.masked_fill(missing, torch.inf).amin(1),
            "attention/max_logit": max_logit.masked_fill(missing, -torch.inf).amax(1),
            "attention/p_max": p_max.masked_fill(missing, 0).sum(1) / number,
        }
        measured = rows.sum(1) > 0
        found = {"entropy/attention/mean": mean.masked_fill(~measured, 0).sum() / measured.sum()}
        for group, column in columns.items():
            found |= {f"{group}/{name}": value for name, value in zip(self.layers.names, column, strict=True)}
        return found


class AttentionProbe:
    """Adds up the attention calls of one optimiser step on this rank.

    A layer that is called several times counts every time, but what activation checkpointing repeats counts only if the
    first pass was not seen (that of reentrant checkpointing has no gradients).

    Args:
        step: optimiser step.
        seed: of the sample.
        rows: query rows of each sequence.
        sequences: sequences of each call.
        min_keys: rows that see fewer keys are left out, unless no row of the call could see as many.
    """

    def __init__(self, step: int, seed: int, rows: int, sequences: int, min_keys: int) -> None:
        self.step = step
        self._seed, self._rows, self._sequences, self._min_keys = seed, rows, sequences, min_keys
        self._sums: dict[str, Tensor] = {}
        self._tops: dict[str, Tensor] = {}
        self._numbers: dict[str, int | None] = {}
        self._samples: dict[int, Tensor] = {}

    @torch.no_grad()
    def add(self, call: AttentionCall) -> None:
        """Take an attention call."""
        if call.recomputed and call.name in self._sums:
            return
        B, _, Tq, _ = call.q.shape
        if not B or not Tq:
            return
        if Tq not in self._samples:
            self._samples[Tq] = sample_rows(Tq, self._rows, self._seed).to(call.q.device, non_blocking=True)
        first = Random(self._seed).randrange(max(1, B - self._sequences + 1))
        sums, tops = self._count(call, self._samples[Tq], slice(first, first + self._sequences))
        if call.name in self._sums:
            sums, tops = self._sums[call.name] + sums, torch.maximum(self._tops[call.name], tops)
        self._sums[call.name], self._tops[call.name], self._numbers[call.name] = sums, tops, call.layer

    def _count(self, call: AttentionCall, rows: Tensor, sequences: slice) -> tuple[Tensor, Tensor]:
        """Sums [4, H] and largest logits [H] of one call."""
        stats = call.stats(rows, sequences)
        least = min(self._min_keys, call.k.shape[2], call.window or self._min_keys)
        counted = stats.visible_keys >= least
        if (padding := call.padding(rows, sequences)) is not None:
            counted &= ~padding[:, None]
        finite = counted & stats.entropy.isfinite()
        sums = torch.stack(
            [
                torch.where(finite, stats.normalized_entropy, 0),
                torch.where(finite, stats.p_max, 0),
                counted.to(stats.entropy.dtype),
                (counted & ~finite).to(stats.entropy.dtype),
            ]
        ).sum((1, 3))
        return sums.float(), torch.where(finite, stats.max_raw_logit, -torch.inf).amax((0, 2)).float()

    def layers(self) -> Layers:
        """The layers that were called, on any rank; every rank must call this."""
        mine = [(path, self._numbers[path], sums.shape[1]) for path, sums in self._sums.items()]
        found: list[Any] = [mine]
        if _num_ranks() > 1:
            found = [None] * _num_ranks()
            dist.all_gather_object(found, mine)
        rows = list({row[0]: row for rank in found for row in rank}.values())
        paths, numbers, heads = zip(*rows, strict=True) if rows else ((), (), ())
        distinct = None not in numbers and len(set(numbers)) == len(numbers)
        return Layers(paths, numbers if distinct else paths, heads)

    def unknown(self, layers: Layers) -> list[str]:
        """Paths that were called, but are not among these layers."""
        return [path for path in self._sums if path not in layers.paths]

    def finish(self, layers: Layers, device: torch.device) -> ProbeResult:
        """Reduce over ranks: sums add up, so that every row counts the same; every rank must call this."""
        H = max(layers.heads)
        sums = torch.zeros(_SUMS, len(layers.paths), H, device=device)
        tops = torch.full((len(layers.paths), H), -torch.inf, device=device)
        for index, path in enumerate(layers.paths):
            if path in self._sums:
                heads = self._sums[path].shape[1]
                sums[:, index, :heads], tops[index, :heads] = self._sums[path], self._tops[path]
        if _num_ranks() > 1:
            dist.all_reduce(sums)
            dist.all_reduce(tops, dist.ReduceOp.MAX)
        entropy, p_max, rows, broken = sums
        values = torch.stack([entropy / rows, tops, p_max / rows])
        # a NaN is no small thing that a mean may hide
        values = values.masked_fill((broken > 0) | (rows == 0), torch.nan)
        return ProbeResult(self.step, layers, torch.cat([values, sums[2:]]))


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
