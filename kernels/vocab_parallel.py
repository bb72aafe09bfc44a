"""Heads whose vocabulary is cut into shards, one for each rank of a process group, in the order of the ranks.

Shape key: N rows, V entries of this rank's shard.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.library import custom_op

__all__ = ["NOWHERE", "WHOLE", "Shard", "locate_shard", "resolve_group"]

# an id that no shard holds
NOWHERE = 1 << 62


class Shard(NamedTuple):
    """Where this rank's part of the vocabulary is; without a group it is the whole."""

    group: str = ""  # name of the process group
    offset: Tensor | None = None  # int64 scalar: global id of this shard's first entry


# the vocabulary of one process
WHOLE = Shard()


def resolve_group(name: str) -> dist.ProcessGroup | None:
    """The process group of a name, None for the empty one; raises ValueError if it has been destroyed."""
    if not name:
        return None
    resolve: Any = _resolve_process_group  # its argument is a type of its own in some versions of torch
    try:
        return resolve(name)
    except RuntimeError as error:
        raise ValueError(
            f"`vocab_parallel_group` {name!r} does not exist (any more): call init_process_group first, and this before"
            " destroy_process_group."
        ) from error


@custom_op("litropy::locate_shard", mutates_args=())
def locate_shard(
    target: Tensor | None, num_entries: int, num_rows: int, class_weight: Tensor | None, like: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tell every rank where its shard is and which targets it holds; one gather of four numbers a rank.

    Args:
        target: global token ids, [N]; negative ones are ignored.
        num_entries: V.
        num_rows: N.
        class_weight: weights of this shard's entries, [V].
        like: a tensor with the dtype and device of the weights to return.
        group: name of the process group.

    Returns:
        The offset (int64 scalar); the targets as ids of this shard, [N], ``NOWHERE`` for those of other shards;
        each entry's share of the mean log-probability, [V], and their sum over all shards; and the class weight of
        each row's target, [N]. Empty tensors stand for what was not given.

    Raises:
        ValueError: on a CPU, if ranks hold different rows or a target is in no shard. On a GPU, where looking would
            wait, such rows become NaN.
    """
    processes = resolve_group(group)
    assert processes is not None
    held = 0.0 if class_weight is None else class_weight.sum(dtype=torch.float64)
    numbers = (num_entries, num_rows, held, _checksum(target))
    mine = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=like.device) for x in numbers])
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(processes))]
    dist.all_gather(parts, mine, processes)
    sizes, rows, weights, checksums = torch.stack(parts).unbind(1)
    rank = dist.get_rank(processes)
    offset, total = sizes[:rank].sum().to(torch.int64), sizes.sum()
    if like.device.type == "cpu":
        _check(target, sizes.tolist(), rows.tolist(), checksums.tolist())
    share = like.new_full((num_entries,), 1.0) if class_weight is None else class_weight.to(like.dtype)
    mean_total = total.new_ones(()) if class_weight is None else weights.sum() / total
    local, nll_weight = like.new_empty(0, dtype=torch.int64), like.new_empty(0)
    if target is not None:
        same = (checksums == checksums[0]).all()
        inside = (target >= offset) & (target < offset + num_entries) & same
        local = torch.where(inside, target - offset, NOWHERE).masked_fill(target < 0, -1)
        if class_weight is not None:
            nll_weight = like.new_zeros(target.shape[0])
            if num_entries:
                picked = share[(target - offset).clamp(0, num_entries - 1)]
                nll_weight = torch.where(inside, picked, nll_weight)
            dist.all_reduce(nll_weight, dist.ReduceOp.SUM, processes)
    return offset, local, share / total.to(like.dtype), mean_total.to(like.dtype), nll_weight


@locate_shard.register_fake
def _(
    target: Tensor | None, num_entries: int, num_rows: int, class_weight: Tensor | None, like: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = 0 if target is None else target.shape[0]
    return (
        like.new_empty((), dtype=torch.int64),
        like.new_empty(rows, dtype=torch.int64),
        like.new_empty(num_entries),
        like.new_empty(()),
        like.new_empty(0 if class_weight is None else rows),
    )


def _checksum(target: Tensor | None) -> Tensor | float:
    """A number that differs where targets or their order do, exact up to 2^53."""
    if target is None:
        return 0.0
    position = torch.arange(target.shape[0], device=target.device)
    return ((target + 2).clamp_max(1 << 20) * (position % 4099 + 1)).sum()


def _check(target: Tensor | None, sizes: list[float], rows: list[float], checksums: list[float]) -> None:
    if len(set(rows)) > 1 or len(set(checksums)) > 1:
        raise ValueError(
            f"The ranks of `vocab_parallel_group` hold different tokens ({[int(n) for n in rows]} of them); every rank"
            " needs the same tokens and its own shard of the vocabulary. A head that is sharded for data parallelism"
            " (FSDP) must be gathered first: compute the loss inside the module's forward."
        )
    if not sum(sizes):
        raise ValueError("`linear_weight` has no rows on any rank of `vocab_parallel_group`.")
    if target is not None and target.numel() and int(target.max()) >= sum(sizes):
        raise ValueError(
            f"`target` holds {int(target.max())}, but the shards of `vocab_parallel_group` cover"
            f" {int(sum(sizes))} entries ({[int(v) for v in sizes]}): does every rank pass its whole shard?"
        )
