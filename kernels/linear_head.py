"""The linear head's row statistics as a PyTorch operator with a backward pass.

For hidden states h [N, D], head weight W [V, D] and logits z that are never stored: each row's log-probability,
log-sum-exp, entropy, mean log-probability and argmax. The backward pass recomputes the logits and turns cotangents of
the first four into gradients of h, W and b. ``linear_head_reference.py`` has the mathematics, README.md in this
folder how it is computed.

Shape key: N rows, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from litropy.kernels.linear_head_operands import (
    Gradients,
    Statistics,
    check_target,
    gradient_buffers,
    stat_fields,
    wanted_gradients,
)
from litropy.kernels.linear_head_torch import row_gradients, row_statistics
from litropy.kernels.linear_head_types import Cotangents, Head, RowStats, Want

__all__ = ["linear_head_rows"]


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
    check_target(target, weight.shape[0])
    head = Head(weight, bias, inv_temperature, row_inv_temperature, softcap)
    want = Want(entropy, mean_logprob, argmax)
    if impl == "triton":
        from litropy.kernels.linear_head_triton import row_statistics as triton_row_statistics

        return stat_fields(triton_row_statistics(input, head, target, want))
    return stat_fields(row_statistics(input, head, target, want, budget))


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
    return stat_fields(
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
    gradients = gradient_buffers(input, weight, bias, need_input, need_weight, need_bias)
    wanted = wanted_gradients(gradients, need_input, need_weight, need_bias)
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
    return gradient_buffers(input, weight, bias, need_input, need_weight, need_bias)


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
    return (*wanted_gradients(gradients, need_input, need_weight, need_bias), *[None] * 9)


_rows.register_autograd(_rows_autograd, setup_context=_rows_setup)


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
