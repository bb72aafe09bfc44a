"""The linear head's row statistics as a PyTorch operator with a backward pass.

For hidden states h [N, D], head weight W [V, D] and logits z that are never stored: the numbers of ``RowStats`` for
each row. The backward pass recomputes the logits and turns the cotangents of the differentiable ones into gradients
of h, W and b. ``linear_head_reference.py`` has the mathematics, README.md in this folder how it is computed.

Shape key: N rows, D width, V vocabulary, T tiles of it.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import custom_op

from litropy.kernels.linear_head_dense import dense_statistics
from litropy.kernels.linear_head_operands import (
    HEAD_SCHEMA,
    STATS_SCHEMA,
    check_target,
    gradient_buffers,
    returned,
    wanted_gradients,
    without_autocast,
)
from litropy.kernels.linear_head_skipping import select_tiles, tile_of
from litropy.kernels.linear_head_sums import finish_sums, reduce_sums
from litropy.kernels.linear_head_torch import row_gradients, row_sums
from litropy.kernels.linear_head_types import Cotangents, Head, RowStats, Want
from litropy.kernels.vocab_parallel import WHOLE, Shard, resolve_group

__all__ = ["Plan", "linear_head_rows"]


class Plan(NamedTuple):
    """How the statistics are computed."""

    impl: Literal["triton", "torch"]
    dtype: torch.dtype  # of the matrix products
    budget: int  # workspace in bytes
    skip_tol: float = 0.0  # largest share of a row's mass that the backward pass may leave out


# beside the plan: where the weight's gradient is added instead of being returned
_PLAN_SCHEMA = "str impl, ScalarType dtype, int budget, float skip_tol"
_SHARD_SCHEMA = "str group, Tensor? offset"
_WANT_SCHEMA = (
    "bool entropy, bool mean_logprob, bool argmax, bool varentropy, bool collision, bool entropy_drift, bool rank,"
    " int top_k, float top_p, bool open_nucleus"
)
_HEAD, _WANT = len(Head._fields), len(Want._fields)


def _unpack(
    arguments: tuple[Any, ...],
) -> tuple[Tensor, Head, Tensor | None, Want, Shard, Plan]:
    input, *rest = arguments
    head, target, rest = Head(*rest[:_HEAD]), rest[_HEAD], rest[_HEAD + 1 :]
    want, shard, plan = Want(*rest[:_WANT]), Shard(*rest[_WANT : _WANT + 2]), Plan(*rest[_WANT + 2 : -1])
    return input, head, target, want, shard, plan


@custom_op(
    "litropy::linear_head_rows",
    mutates_args=(),
    schema=f"(Tensor input, {HEAD_SCHEMA}, Tensor? target, {_WANT_SCHEMA}, {_SHARD_SCHEMA}, {_PLAN_SCHEMA},"
    f" Tensor? master) -> ({STATS_SCHEMA}, Tensor)",
)
@without_autocast
def _rows(*arguments: Any) -> tuple[Tensor, ...]:
    input, head, target, want, shard, plan = _unpack(arguments)
    if not shard.group:
        check_target(target, head.weight.shape[0])
    input, head = input.to(plan.dtype), head.to(plan.dtype)
    skips = plan.skip_tol > 0
    stats = RowStats.zeros(input.shape[0], input, head.stats_dtype, target is not None, want, skips)
    if want.ranking:
        assert not skips, "statistics that rank logits have no backward pass that skips tiles"
        if plan.impl == "triton" and not shard.group:
            from litropy.kernels.linear_head_triton_ranking import ranked_statistics

            stats.put(slice(None), ranked_statistics(input, head, target, want, plan.budget))
        else:
            stats.put(slice(None), dense_statistics(input, head, target, want, shard, plan.budget))
        return (*stats.values(), _no_tiles(input))
    if plan.impl == "triton":
        from litropy.kernels.linear_head_triton import row_sums as triton_row_sums

        sums, masses = triton_row_sums(input, head, target, want, skips)
    else:
        sums, masses = row_sums(input, head, target, want, plan.budget, skips)
    group = resolve_group(shard.group)
    if group is not None:
        assert shard.offset is not None
        seen = 1.0 if head.mean_weight is None else head.mean_weight.sum()
        reduce_sums(sums, group, seen, shard.offset)
    stats.put(slice(None), finish_sums(sums, target, 1.0 if head.mean_total is None else head.mean_total, want))
    if masses is None:
        return (*stats.values(), _no_tiles(input))
    # with a softcap, what label smoothing adds to a tile cannot be had without its logits
    tolerance = -1.0 if head.softcap and want.mean_logprob else plan.skip_tol
    tile, V = tile_of(plan.impl, plan.dtype), head.weight.shape[0]
    kept = select_tiles(masses, tile, V, stats, target, want, tolerance, plan.budget, group)
    return (*stats.values(), kept)


def _no_tiles(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.bool)


@_rows.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    input, head, target, want, _, plan = _unpack(arguments)
    dtype = torch.float64 if plan.dtype == torch.float64 else torch.float32
    skips = plan.skip_tol > 0
    stats = RowStats.zeros(input.shape[0], input, dtype, target is not None, want, skips)
    kept = _no_tiles(input)
    if skips:
        height, width = tile_of(plan.impl, plan.dtype)
        kept = kept.new_empty((-(-input.shape[0] // height), -(-head.weight.shape[0] // width)))
    return (*stats.values(), kept)


_STAT_NAMES = tuple(vars(RowStats()))
_DIFFERENTIABLE = Cotangents._fields
# what the backward pass reads of the statistics
_SAVED = (
    "logprob",
    "max_logit",
    "max_logprob",
    "entropy",
    "varentropy",
    "nucleus_entropy",
    "nucleus_boundary",
    "nucleus_log_mass",
)


@custom_op(
    "litropy::linear_head_rows_backward",
    mutates_args=("master",),
    schema=f"({', '.join(f'Tensor? g_{name}' for name in _DIFFERENTIABLE)}, Tensor input, {HEAD_SCHEMA},"
    f" Tensor? target, {', '.join(f'Tensor {name}' for name in _SAVED)}, Tensor kept, bool[] need, str group,"
    f" {_PLAN_SCHEMA}, Tensor(a!)? master) -> (Tensor, Tensor, Tensor, Tensor)",
)
@without_autocast
def _rows_backward(*arguments: Any) -> tuple[Tensor, ...]:
    g, input, head, target, stats, kept, need, group_name, plan, master = _unpack_backward(arguments)
    gradients = gradient_buffers(input, head, need)
    group = resolve_group(group_name)
    if group is not None and gradients.input is not None:
        # shares of all ranks are added before rounding
        gradients = gradients._replace(input=gradients.input.to(head.to(plan.dtype).stats_dtype))
    if master is not None:
        gradients = gradients._replace(weight=master)
    tiles = kept if kept.numel() else None
    inputs = (input.to(plan.dtype), head.to(plan.dtype), target, stats, g, gradients, plan.budget, tiles)
    if plan.impl == "triton":
        from litropy.kernels.linear_head_triton import row_gradients as triton_row_gradients

        triton_row_gradients(*inputs)
    else:
        row_gradients(*inputs)
    if group is not None and gradients.input is not None:
        dist.all_reduce(gradients.input, dist.ReduceOp.SUM, group)
        gradients = gradients._replace(input=gradients.input.to(input.dtype))
    if master is not None:
        gradients = gradients._replace(weight=None)
    return returned(gradients, input)


def _unpack_backward(
    arguments: tuple[Any, ...],
) -> tuple[Cotangents, Tensor, Head, Tensor | None, RowStats, Tensor, tuple[bool, ...], str, Plan, Tensor | None]:
    rest = list(arguments)

    def take(count: int) -> list[Any]:
        taken, rest[:count] = rest[:count], []
        return taken

    g, (input,), head, (target,) = Cotangents(*take(len(_DIFFERENTIABLE))), take(1), Head(*take(_HEAD)), take(1)
    saved = dict(zip(_SAVED, take(len(_SAVED)), strict=True))
    stats = RowStats(lse=saved["max_logit"] - saved["max_logprob"], **saved)
    (kept, need, group), plan, (master,) = take(3), Plan(*take(4)), take(1)
    return g, input, head, target, stats, kept, tuple(need), group, plan, master


@_rows_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    _, input, head, _, _, _, need, _, _, master = _unpack_backward(arguments)
    gradients = gradient_buffers(input, head, need)
    return returned(gradients if master is None else gradients._replace(weight=None), input)


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, head, target, _, shard, ctx.plan = _unpack(inputs)
    stats, ctx.group = dict(zip(_STAT_NAMES, output, strict=False)), shard.group
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(stats[name] for name in _STAT_NAMES if name not in _DIFFERENTIABLE), output[-1])
    *tensors, ctx.inv_temperature, ctx.softcap = head
    ctx.master = inputs[-1]  # not among the saved tensors: it changes with every backward pass
    ctx.save_for_backward(input, *tensors, target, *(stats[name] for name in _SAVED), output[-1])


def _rows_autograd(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    input, *rest = ctx.saved_tensors
    tensors, target, saved, kept = rest[: _HEAD - 2], rest[_HEAD - 2], rest[_HEAD - 1 : -1], rest[-1]
    by_name = dict(zip(_STAT_NAMES, cotangents, strict=False))
    g = [by_name[name] for name in _DIFFERENTIABLE]
    g = [None if x is None or not x.numel() else x.contiguous() for x in g]
    need = list(ctx.needs_input_grad[:4])
    head = (*tensors, ctx.inv_temperature, ctx.softcap)
    master = ctx.master if need[1] else None
    gradients = _rows_backward(*g, input, *head, target, *saved, kept, need, ctx.group, *ctx.plan, master)
    if master is not None:
        need[1] = False
    return (*wanted_gradients(gradients, tuple(need)), *[None] * (_HEAD + _WANT + len(Plan._fields) + 1))


_rows.register_autograd(_rows_autograd, setup_context=_rows_setup)


def linear_head_rows(
    input: Tensor,
    head: Head,
    target: Tensor | None,
    want: Want,
    plan: Plan,
    shard: Shard = WHOLE,
    master: Tensor | None = None,
) -> tuple[RowStats, Tensor]:
    """Statistics of every row, differentiable with respect to input, weight, bias and low-rank matrix.

    Args:
        input: hidden states, [N, D], or [N, D + R] for a head with a low-rank addition.
        head: the head.
        target: token ids, [N] int64; negative rows are ignored: 0 everywhere, no gradient.
        want: the optional statistics.
        plan: how.
        shard: which part of the vocabulary this rank holds; ``target`` has the ids of the shard.
        master: [V, D], where the weight's gradient is added instead of being returned.

    Returns:
        The statistics, and which tiles the backward pass keeps (empty without ``skip_tol``).

    Raises:
        ValueError: if a target is outside the vocabulary, on a CPU; on a GPU that row is NaN.
    """
    *stats, kept = _rows(input, *head, target, *want, *shard, *plan, master)
    return RowStats(*stats), kept
