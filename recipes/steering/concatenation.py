"""Batches of responses one below the other, each padded to the longest."""

from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor

from litropy.losses import HeadStats
from litropy.recipes.steering.batch import RolloutBatch

__all__ = ["concatenate", "trim"]


def _padded(values: list[Tensor], left: bool) -> Tensor:
    if values[0].ndim == 1:
        return torch.cat(values)
    width = max(value.shape[1] for value in values)
    gaps = [width - value.shape[1] for value in values]
    return torch.cat([F.pad(value, (gap, 0) if left else (0, gap)) for value, gap in zip(values, gaps, strict=True)])


def concatenate(batches: list[RolloutBatch]) -> RolloutBatch:
    """Put batches one below the other; prompts are padded on the left, everything else on the right."""
    names = [f.name for f in fields(RolloutBatch) if isinstance(getattr(batches[0], f.name), Tensor)]
    joined = {
        name: _padded([getattr(batch, name) for batch in batches], left=name.startswith("prompt")) for name in names
    }
    # those that waited in a checkpoint may lack what a callback asks for since
    stats = [f.name for f in fields(HeadStats) if all(getattr(b.stats, f.name) is not None for b in batches)]
    joined_stats = HeadStats(
        **{name: _padded([getattr(batch.stats, name) for batch in batches], left=False) for name in stats}
    )
    return RolloutBatch(**joined, stats=joined_stats)


def trim(batch: RolloutBatch) -> RolloutBatch:
    """Cut off columns that are padding in every row; this waits for the device."""
    prompt = int(batch.prompt_mask.sum(-1).max()) if len(batch) else 0
    response = int(batch.lengths.max()) if len(batch) else 0

    def cut(name: str, value: Tensor | None) -> Tensor | None:
        if value is None or value.ndim == 1:
            return value
        return value[:, value.shape[1] - prompt :] if name.startswith("prompt") else value[:, :response]

    parts = {f.name: cut(f.name, getattr(batch, f.name)) for f in fields(batch) if f.name != "stats"}
    stats = {f.name: cut(f.name, getattr(batch.stats, f.name)) for f in fields(HeadStats)}
    return RolloutBatch(**parts, stats=HeadStats(**stats))  # type: ignore[arg-type]
