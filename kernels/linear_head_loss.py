"""A weighted sum of row losses as a PyTorch operator that computes the gradients along with the loss.

For losses whose row weights are known beforehand, such as sums and means: the forward pass forms the gradients in
``linear_head_fused.py``, the backward pass scales them in place and gives them away. PyTorch implementation only.

Shape key: N rows, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

import litropy.kernels.linear_head  # noqa: F401 (registers the backward pass that recomputes)
from litropy.kernels.linear_head_fused import fused_gradients
from litropy.kernels.linear_head_operands import check_target, gradient_buffers, stat_fields, wanted_gradients
from litropy.kernels.linear_head_types import Head, RowStats, Want, loss_cotangents, row_losses

__all__ = ["linear_head_loss"]

# loss, statistics, gradients; spelled out, because an operator's schema is inferred from it
LossOutput = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@custom_op("litropy::linear_head_loss", mutates_args=())
def _loss(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor,
    inv_temperature: float,
    row_inv_temperature: Tensor | None,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
    entropy: bool,
    argmax: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    budget: int,
) -> LossOutput:
    check_target(target, weight.shape[0])
    head = Head(weight, bias, inv_temperature, row_inv_temperature, softcap)
    want = Want(entropy, label_smoothing > 0, argmax)
    gradients = gradient_buffers(input, weight, bias, need_input, need_weight, need_bias, zero_weight=False)
    wanted = wanted_gradients(gradients, need_input, need_weight, need_bias)
    stats = fused_gradients(input, head, target, row_weight, label_smoothing, z_loss, want, wanted, budget)
    loss = (row_weight * row_losses(stats, label_smoothing, z_loss)).sum()
    return loss, *stat_fields(stats), *gradients


@_loss.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor,
    inv_temperature: float,
    row_inv_temperature: Tensor | None,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
    entropy: bool,
    argmax: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    budget: int,
) -> LossOutput:
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    stats = RowStats.zeros(input.shape[0], input, dtype, True, Want(entropy, label_smoothing > 0, argmax))
    gradients = gradient_buffers(input, weight, bias, need_input, need_weight, need_bias)
    return stats.lse.new_zeros(()), *stat_fields(stats), *gradients


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, weight, bias, target, row_weight, ctx.inv_temperature, row_inv_temperature, ctx.softcap = inputs[:8]
    ctx.label_smoothing, ctx.z_loss, _, _, *ctx.need, ctx.budget = inputs[8:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    # held by the context alone, so that the backward pass can give them away instead of copying [V, D] numbers
    _, _, _, max_logit, max_logprob, *_ = output
    ctx.gradients = output[-3:]
    ctx.save_for_backward(input, weight, bias, target, row_weight, row_inv_temperature, max_logit, max_logprob)


def _loss_autograd(ctx: Any, g_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * 13
    if g_loss is None:
        return (None, None, None, *nothing)
    if ctx.gradients is None:  # a second backward pass through a retained graph: the first one gave the gradients away
        return (*_recomputed_gradients(ctx, g_loss), *nothing)
    gradients, ctx.gradients = ctx.gradients, None
    for gradient in gradients:
        gradient.mul_(g_loss)
    gradients = wanted_gradients(gradients, *ctx.need)
    return (*gradients, *nothing)


def _recomputed_gradients(ctx: Any, g_loss: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias, target, row_weight, row_inv_temperature, max_logit, max_logprob = ctx.saved_tensors
    cotangents = loss_cotangents(g_loss * row_weight, max_logit - max_logprob, ctx.label_smoothing, ctx.z_loss)
    gradients = torch.ops.litropy.linear_head_rows_backward(
        cotangents.logprob,
        cotangents.lse,
        None,
        cotangents.mean_logprob,
        input,
        weight,
        bias,
        target,
        max_logit,
        max_logprob,
        max_logit[:0],
        ctx.inv_temperature,
        row_inv_temperature,
        ctx.softcap,
        *ctx.need,
        "torch",
        ctx.budget,
    )
    return wanted_gradients(gradients, *ctx.need)


_loss.register_autograd(_loss_autograd, setup_context=_loss_setup)


def linear_head_loss(
    input: Tensor,
    head: Head,
    target: Tensor,
    row_weight: Tensor,
    label_smoothing: float,
    z_loss: float,
    want: Want,
    budget: int,
) -> tuple[Tensor, RowStats]:
    """``sum_n row_weight_n loss_n`` and the rows' detached statistics; the backward pass only scales gradients.

    Args:
        input: hidden states, [N, D], in the dtype of the head.
        head: the head; ``fused_rows`` must not be 0 for it.
        target: token ids, [N] int64; negative rows are ignored.
        row_weight: weight of each row's loss, [N]; no gradient flows to it.
        label_smoothing: share of the loss that goes to the whole vocabulary.
        z_loss: factor of the squared log-sum-exp.
        want: optional statistics: entropy and argmax.
        budget: workspace in bytes.
    """
    need = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (input, head.weight, head.bias)]
    loss, *stats = _loss(
        input,
        head.weight,
        head.bias,
        target,
        row_weight,
        head.inv_temperature,
        head.row_inv_temperature,
        head.softcap,
        label_smoothing,
        z_loss,
        want.entropy,
        want.argmax,
        *need,
        budget,
    )
    return loss, RowStats(*stats[:-3])
