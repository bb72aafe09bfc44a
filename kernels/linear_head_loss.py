"""A weighted sum of row losses as a PyTorch operator that computes the gradients along with the loss.

For losses whose row weights are known beforehand, such as sums and means: the forward pass forms the gradients in
``linear_head_fused.py``, the backward pass scales them in place and gives them away.

Shape key: N rows, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from litropy.kernels.linear_head import Plan
from litropy.kernels.linear_head_fused import BlockGradient, RowLoss, fused_gradients
from litropy.kernels.linear_head_operands import (
    HEAD_SCHEMA,
    STATS_SCHEMA,
    check_target,
    gradient_buffers,
    returned,
    wanted_gradients,
    without_autocast,
)
from litropy.kernels.linear_head_types import Head, RowStats, Want, loss_cotangents, row_losses

__all__ = ["linear_head_loss"]

_HEAD = len(Head._fields)
_LOSS_SCHEMA = "Tensor row_weight, Tensor? nll_weight, float label_smoothing, float z_loss"
# what a loss can have beside it without a product of its own
_WANT_SCHEMA = "bool entropy, bool argmax, bool varentropy, bool collision, bool entropy_drift"


def _unpack(
    arguments: tuple[Any, ...],
) -> tuple[Tensor, Head, Tensor, RowLoss, Want, tuple[bool, ...], str, torch.dtype, int]:
    input, *rest = arguments
    head, target, rest = Head(*rest[:_HEAD]), rest[_HEAD], rest[_HEAD + 1 :]
    loss, (entropy, argmax, varentropy, collision, drift) = RowLoss(*rest[:4]), rest[4:9]
    want = Want(entropy, loss.label_smoothing > 0, argmax, varentropy, collision, drift)
    need, impl, dtype, budget = rest[9:]
    return input, head, target, loss, want, tuple(need), impl, dtype, budget


@custom_op(
    "litropy::linear_head_loss",
    mutates_args=(),
    schema=f"(Tensor input, {HEAD_SCHEMA}, Tensor target, {_LOSS_SCHEMA}, {_WANT_SCHEMA}, bool[] need, str impl,"
    f" ScalarType dtype, int budget) -> (Tensor, {STATS_SCHEMA}, Tensor, Tensor, Tensor, Tensor)",
)
@without_autocast
def _loss(*arguments: Any) -> tuple[Tensor, ...]:
    input, head, target, loss, want, need, impl, dtype, budget = _unpack(arguments)
    check_target(target, head.weight.shape[0])
    gradients = gradient_buffers(input, head, need, zero_weight=False)
    block_gradient: BlockGradient | None = None
    if impl == "triton":
        from litropy.kernels import linear_head_triton

        block_gradient = linear_head_triton.block_gradient
    found = fused_gradients(input.to(dtype), head.to(dtype), target, loss, want, gradients, budget, block_gradient)
    stats = RowStats.zeros(input.shape[0], input, found.lse.dtype, True, want)
    stats.put(slice(None), found)
    total = (loss.row_weight * row_losses(stats, loss.nll_weight, loss.label_smoothing, loss.z_loss)).sum()
    return total, *stats.values(), *returned(gradients, input)


@_loss.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    input, head, _, _, want, need, _, dtype, _ = _unpack(arguments)
    stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    stats = RowStats.zeros(input.shape[0], input, stats_dtype, True, want)
    return stats.lse.new_zeros(()), *stats.values(), *returned(gradient_buffers(input, head, need), input)


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, head, target, loss, _, ctx.need, *ctx.plan = _unpack(inputs)
    row_weight, nll_weight, ctx.label_smoothing, ctx.z_loss = loss
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    # held by the context alone, so that the backward pass can give them away instead of copying [V, D] numbers
    ctx.gradients = output[-4:]
    stats = RowStats(*output[1:-4])
    *tensors, ctx.inv_temperature, ctx.softcap = head
    ctx.save_for_backward(input, *tensors, target, row_weight, nll_weight, stats.max_logit, stats.max_logprob)


def _loss_autograd(ctx: Any, g_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * (_HEAD - 3 + 1 + 4 + 5 + 4)
    if g_loss is None:
        return (None, None, None, None, *nothing)
    if ctx.gradients is None:  # a second backward pass through a retained graph: the first one gave the gradients away
        return (*_recomputed_gradients(ctx, g_loss), *nothing)
    gradients, ctx.gradients = ctx.gradients, None
    for gradient in gradients:
        gradient.mul_(g_loss)
    return (*wanted_gradients(gradients, ctx.need), *nothing)


def _recomputed_gradients(ctx: Any, g_loss: Tensor) -> tuple[Tensor | None, ...]:
    input, *tensors, target, row_weight, nll_weight, max_logit, max_logprob = ctx.saved_tensors
    impl, dtype, budget = ctx.plan
    lse = max_logit - max_logprob
    g = loss_cotangents(g_loss * row_weight, nll_weight, lse, ctx.label_smoothing, ctx.z_loss)
    head = (*tensors, ctx.inv_temperature, ctx.softcap)
    nothing = lse[:0]
    saved = (nothing, max_logit, max_logprob, *[nothing] * 5, nothing.bool())
    plan = Plan(impl, dtype, budget)
    gradients = torch.ops.litropy.linear_head_rows_backward(
        *g, input, *head, target, *saved, list(ctx.need), "", *plan, None
    )
    return wanted_gradients(tuple(gradients), ctx.need)


_loss.register_autograd(_loss_autograd, setup_context=_loss_setup)


def linear_head_loss(
    input: Tensor, head: Head, target: Tensor, loss: RowLoss, want: Want, plan: Plan
) -> tuple[Tensor, RowStats]:
    """The weighted sum of the rows' losses and their detached statistics; the backward pass only scales gradients.

    Args:
        input: hidden states, [N, D].
        head: the head; at least one row of logits must fit the workspace.
        target: token ids, [N] int64; negative rows are ignored.
        loss: what each row's loss is; no gradient flows to its weights.
        want: optional statistics; none that rank logits.
        plan: how.
    """
    factors = (input, head.weight, head.bias, head.low_rank)
    need = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in factors]
    wanted = (want.entropy, want.argmax, want.varentropy, want.collision, want.entropy_drift)
    total, *rest = _loss(input, *head, target, *loss, *wanted, need, plan.impl, plan.dtype, plan.budget)
    return total, RowStats(*rest[:-4])
