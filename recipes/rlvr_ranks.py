"""Rows and gradients of all ranks together."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from litropy.losses import HeadStats
from litropy.recipes.steering.batch import RolloutBatch
from litropy.recipes.steering.concatenation import concatenate, trim

__all__ = ["gather", "gather_batch", "gather_stats", "rank_and_ranks", "sum_gradients"]


def rank_and_ranks() -> tuple[int, int]:
    """This rank and the number of ranks; 0 and 1 without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(value: Tensor) -> list[Tensor]:
    """A tensor of every rank; their shapes may differ, their numbers of dimensions not."""
    _, ranks = rank_and_ranks()
    if ranks == 1:
        return [value]
    shape = torch.tensor(value.shape, device=value.device)
    shapes = [torch.empty_like(shape) for _ in range(ranks)]
    dist.all_gather(shapes, shape)
    sizes = [tuple(found.tolist()) for found in shapes]
    largest = [max(dims) for dims in zip(*sizes, strict=True)]
    gaps = [
        gap for have, want in zip(reversed(value.shape), reversed(largest), strict=True) for gap in (0, want - have)
    ]
    # not every backend moves booleans
    sent = F.pad(value.to(torch.uint8) if value.dtype == torch.bool else value, gaps).contiguous()
    received = [torch.empty_like(sent) for _ in range(ranks)]
    dist.all_gather(received, sent)
    return [
        found[tuple(slice(size) for size in dims)].to(value.dtype) for found, dims in zip(received, sizes, strict=True)
    ]


def gather_batch(batch: RolloutBatch) -> RolloutBatch:
    """The responses of all ranks in the order of their numbers, without columns of nothing but padding."""
    _, ranks = rank_and_ranks()
    if ranks > 1:
        values = batch.to_dict()
        stats = {name: gather(value) for name, value in values.pop("stats").items()}
        columns = {name: [None] * ranks if value is None else gather(value) for name, value in values.items()}
        parts = [
            RolloutBatch.from_dict(
                {name: column[rank] for name, column in columns.items()}
                | {"stats": {name: column[rank] for name, column in stats.items()}}
            )
            for rank in range(ranks)
        ]
        batch = concatenate(parts)
    return trim(batch[batch.row.argsort()])


def gather_stats(stats: HeadStats, num_rows: int) -> HeadStats:
    """Statistics of all rows, where rank r of n has computed rows r, r + n, r + 2n, ... of them."""
    rank, ranks = rank_and_ranks()
    if ranks == 1:
        return stats
    found = {name: value for name, value in vars(stats).items() if value is not None}
    whole = {}
    for name, value in found.items():
        whole[name] = value.new_empty(num_rows, *value.shape[1:])
        for rank, part in enumerate(gather(value)):
            whole[name][rank::ranks] = part
    return HeadStats(**whole)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all ranks; a parameter without one counts as having zeros."""
    _, ranks = rank_and_ranks()
    if ranks == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        pieces = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])
