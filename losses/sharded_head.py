"""Heads that are DTensors: the local shard, and the ranks that hold the others."""

import torch.distributed as dist
from torch import Tensor

__all__ = ["local_head"]

Group = dist.ProcessGroup | None


def local_head(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor | None, group: Group
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Group]:
    """Replace DTensors by what this rank holds of them; a weight that is cut by rows sets the group.

    Gradients come back as DTensors of the same placement.

    Raises:
        ValueError: if a placement is not understood, the group is none, or one is given for a weight that has its own.
    """
    from torch.distributed.tensor import DTensor

    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"`vocab_parallel_group` is {group!r}; it must be a process group that this rank belongs to, such as"
            " mesh.get_group('tensor')."
        )
    if not isinstance(weight, DTensor):
        others = {"input": input, "linear_bias": bias, "target": target}
        if found := [name for name, x in others.items() if isinstance(x, DTensor)]:
            raise ValueError(
                f"`{found[0]}` is a DTensor but `linear_weight` is not; pass both the same way, or"
                f" `{found[0]}.to_local()`."
            )
        return input, weight, bias, target, group
    if group is not None:
        raise ValueError(
            "`linear_weight` is a DTensor, which says itself how it is sharded, and `vocab_parallel_group` is given"
            " as well; leave the group out or pass linear_weight.to_local()."
        )
    cut = [i for i, placement in enumerate(weight.placements) if not placement.is_replicate()]
    if len(cut) > 1 or any(not weight.placements[i].is_shard(0) for i in cut):
        raise ValueError(
            f"`linear_weight` is placed {weight.placements}; only a head that is cut by rows along one mesh dimension"
            " (Shard(0), the vocabulary) or replicated is supported. Gather it first: linear_weight.full_tensor()."
        )
    if cut:
        group = weight.device_mesh.get_group(cut[0])
    if bias is not None:
        if not isinstance(bias, DTensor) or bias.placements != weight.placements:
            raise ValueError("`linear_bias` must be a DTensor placed like `linear_weight`.")
        bias = bias.to_local()
    return _replicated("input", input), weight.to_local(), bias, _maybe(target), group


def _maybe(target: Tensor | None) -> Tensor | None:
    return None if target is None else _replicated("target", target)


def _replicated(name: str, tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor
    if not all(placement.is_replicate() for placement in tensor.placements):
        raise ValueError(
            f"`{name}` is placed {tensor.placements}; every rank needs all rows: redistribute to Replicate."
        )
    return tensor.to_local()
