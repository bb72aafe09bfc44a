"""The linear head as PyTorch operators: row statistics, and a loss whose gradient comes with the forward pass.

For hidden states h [N, D], head weight W [V, D] and logits z that are never stored, see ``linear_head_reference.py``
for the mathematics and README.md in this folder for how it is computed. Both work under
``torch.compile(fullgraph=True)``.

* ``linear_head_rows`` gives each row's log-probability, log-sum-exp, entropy, mean log-probability and argmax. Its
  backward pass recomputes the logits and turns cotangents of the first four into gradients of h, W and b.
* ``linear_head_loss`` gives ``sum_n w_n loss_n`` for row weights known beforehand (PyTorch implementation only).

Shape key: N rows, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from litropy.kernels.linear_head_fused import fused_gradients
from litropy.kernels.linear_head_torch import row_gradients, row_statistics
from litropy.kernels.linear_head_types import Cotangents, Head, RowStats, Want, loss_cotangents

__all__ = ["linear_head_loss", "linear_head_rows"]

Statistics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]
# loss, statistics, gradients; spelled out, because an operator's schema is inferred from it
LossOutput = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _check_target(target: Tensor | None, vocabulary: int) -> None:
    """Reject targets outside the vocabulary on a CPU; on a GPU, where looking would wait, such rows become NaN."""
    if target is not None and target.device.type == "cpu" and target.numel() and int(target.max()) >= vocabulary:
        raise ValueError(
            f"`target` holds {int(target.max())}, but the vocabulary has {vocabulary} entries (0 to {vocabulary - 1})."
            " Check that the tokenizer belongs to this model; mark tokens without a loss with `ignore_index`."
        )


def _empty_gradients(
    input: Tensor, weight: Tensor, bias: Tensor | None, need_input: bool, need_weight: bool, need_bias: bool
) -> Gradients:
    """Zeros in the shape of each gradient that is needed, and empty tensors for the others, as operators do."""

    def zeros(wanted: bool, like: Tensor | None) -> Tensor:
        if wanted and like is not None:
            return torch.zeros_like(like, memory_format=torch.contiguous_format)
        return input.new_zeros(0)

    return zeros(need_input, input), zeros(need_weight, weight), zeros(need_bias, bias)


def _wanted(gradients: Gradients, *need: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    input, weight, bias = (gradient if wanted else None for gradient, wanted in zip(gradients, need, strict=True))
    return input, weight, bias


def _fields(stats: RowStats) -> Statistics:
    return (
        stats.logprob,
        stats.lse,
        stats.max_logit,
        stats.max_logprob,
        stats.entropy,
        stats.mean_logprob,
        stats.argmax,
    )


@custom_op("litropy::linear_head_rows", mutates_args=())
def _rows(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    inv_temperature: float,
    row_inv_temperature: Tensor | None,
    softcap: float,
    entropy: bool,
    mean_logprob: bool,
    argmax: bool,
    impl: str,
    budget: int,
) -> Statistics:
    _check_target(target, weight.shape[0])
    head = Head(weight, bias, inv_temperature, row_inv_temperature, softcap)
    want = Want(entropy, mean_logprob, argmax)
    if impl == "triton":
        from litropy.kernels.linear_head_triton import row_statistics as triton_row_statistics

        return _fields(triton_row_statistics(input, head, target, want))
    return _fields(row_statistics(input, head, target, want, budget))


@_rows.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    inv_temperature: float,
    row_inv_temperature: Tensor | None,
    softcap: float,
    entropy: bool,
    mean_logprob: bool,
    argmax: bool,
    impl: str,
    budget: int,
) -> Statistics:
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return _fields(
        RowStats.zeros(input.shape[0], input, dtype, target is not None, Want(entropy, mean_logprob, argmax))
    )


@custom_op("litropy::linear_head_rows_backward", mutates_args=())
def _rows_backward(
    g_logprob: Tensor | None,
    g_lse: Tensor | None,
    g_entropy: Tensor | None,
    g_mean_logprob: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    max_logit: Tensor,
    max_logprob: Tensor,
    entropy: Tensor,
    inv_temperature: float,
    row_inv_temperature: Tensor | None,
    softcap: float,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    impl: str,
    budget: int,
) -> Gradients:
    head = Head(weight, bias, inv_temperature, row_inv_temperature, softcap)
    empty = max_logit[:0]
    stats = RowStats(empty, max_logit - max_logprob, max_logit, max_logprob, entropy, empty, empty)
    cotangents = Cotangents(g_logprob, g_lse, g_entropy, g_mean_logprob)
    gradients = _empty_gradients(input, weight, bias, need_input, need_weight, need_bias)
    wanted = _wanted(gradients, need_input, need_weight, need_bias)
    if impl == "triton":
        from litropy.kernels.linear_head_triton import row_gradients as triton_row_gradients

        triton_row_gradients(input, head, target, stats, cotangents, wanted, budget)
    else:
        row_gradients(input, head, target, stats, cotangents, wanted, budget)
    return gradients


@_rows_backward.register_fake
def _(
    g_logprob: Tensor | None,
    g_lse: Tensor | None,
    g_entropy: Tensor | None,
    g_mean_logprob: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    max_logit: Tensor,
    max_logprob: Tensor,
    entropy: Tensor,
    inv_temperature: float,
    row_inv_temperature: Tensor | None,
    softcap: float,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    impl: str,
    budget: int,
) -> Gradients:
    return _empty_gradients(input, weight, bias, need_input, need_weight, need_bias)


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: Statistics) -> None:
    (
        input,
        weight,
        bias,
        target,
        ctx.inv_temperature,
        row_inv_temperature,
        ctx.softcap,
        _,
        _,
        _,
        ctx.impl,
        ctx.budget,
    ) = inputs
    _, _, max_logit, max_logprob, entropy, _, argmax = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(max_logit, max_logprob, argmax)
    ctx.save_for_backward(input, weight, bias, target, row_inv_temperature, max_logit, max_logprob, entropy)


def _rows_autograd(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    input, weight, bias, target, row_inv_temperature, max_logit, max_logprob, entropy = ctx.saved_tensors
    g_logprob, g_lse, _, _, g_entropy, g_mean_logprob, _ = (
        None if g is None or not g.numel() else g.contiguous() for g in cotangents
    )
    need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
    gradients = _rows_backward(
        g_logprob,
        g_lse,
        g_entropy,
        g_mean_logprob,
        input,
        weight,
        bias,
        target,
        max_logit,
        max_logprob,
        entropy,
        ctx.inv_temperature,
        row_inv_temperature,
        ctx.softcap,
        need_input,
        need_weight,
        need_bias,
        ctx.impl,
        ctx.budget,
    )
    return (*_wanted(gradients, need_input, need_weight, need_bias), *[None] * 9)


_rows.register_autograd(_rows_autograd, setup_context=_rows_setup)


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
    _check_target(target, weight.shape[0])
    head = Head(weight, bias, inv_temperature, row_inv_temperature, softcap)
    want = Want(entropy, label_smoothing > 0, argmax)
    gradients = _empty_gradients(input, weight, bias, need_input, need_weight, need_bias)
    wanted = _wanted(gradients, need_input, need_weight, need_bias)
    stats = fused_gradients(input, head, target, row_weight, label_smoothing, z_loss, want, wanted, budget)
    loss = (row_weight * row_losses(stats, label_smoothing, z_loss)).sum()
    return loss, *_fields(stats), *gradients


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
    gradients = _empty_gradients(input, weight, bias, need_input, need_weight, need_bias)
    return stats.lse.new_zeros(()), *_fields(stats), *gradients


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
    gradients = _wanted(gradients, *ctx.need)
    return (*gradients, *nothing)


def _recomputed_gradients(ctx: Any, g_loss: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias, target, row_weight, row_inv_temperature, max_logit, max_logprob = ctx.saved_tensors
    cotangents = loss_cotangents(g_loss * row_weight, max_logit - max_logprob, ctx.label_smoothing, ctx.z_loss)
    gradients = _rows_backward(
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
    return _wanted(gradients, *ctx.need)


_loss.register_autograd(_loss_autograd, setup_context=_loss_setup)


def row_losses(stats: RowStats, label_smoothing: float, z_loss: float) -> Tensor:
    """``(1 - s) nll + s mean_v(-log p_v) + z_loss lse^2`` of each row, [N]."""
    losses = (
        -stats.logprob
        if not label_smoothing
        else (label_smoothing - 1) * stats.logprob - label_smoothing * stats.mean_logprob
    )
    return losses + z_loss * stats.lse.square() if z_loss else losses


def linear_head_rows(input: Tensor, head: Head, target: Tensor | None, want: Want, impl: str, budget: int) -> RowStats:
    """Statistics of every row, differentiable with respect to input, weight and bias (all but argmax).

    Args:
        input: hidden states, [N, D], in the dtype of the head.
        head: the head.
        target: token ids, [N] int64; negative rows are ignored: 0 everywhere, no gradient.
        want: the optional statistics.
        impl: ``"triton"`` or ``"torch"``.
        budget: workspace in bytes.

    Raises:
        ValueError: if a target is outside the vocabulary, on a CPU; on a GPU that row is NaN.
    """
    scalars = (head.inv_temperature, head.row_inv_temperature, head.softcap)
    wants = (want.entropy, want.mean_logprob, want.argmax)
    return RowStats(*_rows(input, head.weight, head.bias, target, *scalars, *wants, impl, budget))


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
