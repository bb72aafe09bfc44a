"""Divergence of a linear head's distribution q from a teacher's p as a PyTorch operator; no logits are stored.

A block of whole rows of both models' logits fits the workspace; the student's become the gradient in place::

    forward    L = sum p (log p - log q)                             dz = q - p
    reverse    L = sum q (log q - log p)                             dz = q (log q - log p - L)
    jsd        L = b sum p (log p - log m) + (1 - b) S               dz = (1 - b) q (log q - log m - S)
               with S = sum q (log q - log m), m = b p + (1 - b) q

Shape key: N rows, D width, V vocabulary; n is the number of rows in a block.
"""

import math
import re
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from litropy.kernels.linear_head import Plan
from litropy.kernels.linear_head_fused import accumulator, add_product, write_sums
from litropy.kernels.linear_head_operands import (
    HEAD_SCHEMA,
    gradient_buffers,
    returned,
    wanted_gradients,
    without_autocast,
)
from litropy.kernels.linear_head_tiles import (
    Rows,
    Workspace,
    apply_slope_,
    cached_parts,
    final_logits_,
    raw_logits,
    scratch_elements,
)
from litropy.kernels.linear_head_types import Gradients, Head

__all__ = ["Divergence", "Teacher", "linear_head_divergence", "rows_of_both"]

# share of the workspace for both models' logits; the rest is for scratch and the matrix library
_LOGITS_SHARE = 0.6
# more rows than this only move logits out of a CPU's caches
_CACHED_ROWS = 512
_HEAD = len(Head._fields)
_TEACHER_SCHEMA = re.sub(r"(Tensor\??|float) ", r"\1 teacher_", HEAD_SCHEMA)
_REST = 9  # arguments behind the two models and the mask


class Divergence(NamedTuple):
    """Which divergence; ``beta`` is the teacher's share of the mixture: 1 for the forward one, 0 for the reverse."""

    kind: Literal["forward_kl", "reverse_kl", "jsd"]
    beta: float


class Teacher(NamedTuple):
    """The model to learn from; no gradient flows to it."""

    input: Tensor  # [N, D']
    head: Head  # [V, D']
    dtype: torch.dtype  # of its matrix products


def rows_of_both(num_rows: int, vocabulary: int, dtypes: tuple[torch.dtype, torch.dtype], budget: int) -> int:
    """The greatest number of whole rows of both models' logits in the workspace, in equal blocks; 0 if none fits."""
    bytes_a_row = vocabulary * sum(dtype.itemsize for dtype in dtypes)
    n = min(num_rows, int(budget * _LOGITS_SHARE) // max(1, bytes_a_row))
    if not n or scratch_elements(budget) < vocabulary:
        return 0
    # multiples of 16 rows, which matrix libraries like
    return min(n, -(-num_rows // (16 * -(-num_rows // n))) * 16)


@custom_op(
    "litropy::linear_head_divergence",
    mutates_args=(),
    schema=f"(Tensor input, {HEAD_SCHEMA}, Tensor teacher_input, {_TEACHER_SCHEMA}, Tensor mask, Tensor row_weight,"
    " str kind, float beta, bool[] need, ScalarType teacher_dtype, str impl, ScalarType dtype, int budget,"
    " float skip_tol) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@without_autocast
def _divergence(*arguments: Any) -> tuple[Tensor, ...]:
    input, head, teacher, mask, row_weight, divergence, need, plan = _unpack(arguments)
    gradients = gradient_buffers(input, head, need, zero_weight=False)
    teacher = teacher._replace(input=teacher.input.to(teacher.dtype), head=teacher.head.to(teacher.dtype))
    student = (input.to(plan.dtype), head.to(plan.dtype))
    losses = _by_block(*student, teacher, mask, row_weight, divergence, gradients, plan)
    return (row_weight * losses).sum(), losses, *returned(gradients, input)


def _unpack(
    arguments: tuple[Any, ...],
) -> tuple[Tensor, Head, Teacher, Tensor, Tensor, Divergence, tuple[bool, ...], Plan]:
    (input, *rest), tail = arguments[:-_REST], arguments[-_REST:]
    head, (teacher_input, *teacher_head, mask) = Head(*rest[:_HEAD]), rest[_HEAD:]
    row_weight, kind, beta, need, teacher_dtype, *plan = tail
    teacher = Teacher(teacher_input, Head(*teacher_head), teacher_dtype)
    return input, head, teacher, mask, row_weight, Divergence(kind, beta), tuple(need), Plan(*plan)


def _by_block(
    input: Tensor,
    head: Head,
    teacher: Teacher,
    mask: Tensor,
    row_weight: Tensor,
    divergence: Divergence,
    gradients: Gradients,
    plan: Plan,
) -> Tensor:
    """The divergence of every row, [N], 0 where the mask is; writes the gradients that are wanted."""
    V = head.weight.shape[0]
    rows = Rows.of(input, mask.long() - 1)
    n_max = rows_of_both(len(rows), V, (plan.dtype, teacher.dtype), plan.budget) or 1
    if input.device.type == "cpu":
        n_max = min(n_max, _CACHED_ROWS)
    work, teacher_work = Workspace(head, n_max, V, plan.budget), Workspace(teacher.head, n_max, V, plan.budget)
    losses = torch.zeros(input.shape[0], dtype=row_weight.dtype, device=input.device)
    has_gradient = any(gradient is not None for gradient in gradients)
    sum_bias = None if gradients.bias is None else torch.zeros_like(gradients.bias, dtype=head.stats_dtype)
    num_blocks = -(-len(rows) // n_max)
    sums = [(columns, out, accumulator(out, head, num_blocks)) for columns, out in gradients.factors(head)]
    first = True
    for index, hidden, _ in rows.blocks(n_max):
        tile = raw_logits(hidden, head, slice(0, V), work)
        teacher_tile = raw_logits(teacher.input[index], teacher.head, slice(0, V), teacher_work)
        block = (head.of_rows(index), teacher.head.of_rows(index), mask[index], row_weight[index], divergence)
        if plan.impl == "triton":
            from litropy.kernels.linear_head_distillation_triton import block_divergence

            losses[index] = block_divergence(tile, teacher_tile, *block, has_gradient)
        else:
            losses[index] = _torch_block(tile, teacher_tile, *block, work, teacher_work)
        if sum_bias is not None:
            sum_bias += tile.sum(0, dtype=sum_bias.dtype)
        if gradients.input is not None:
            for columns, matrix in head.factors():
                gradients.input[index, columns] = torch.mm(tile, matrix).to(gradients.input.dtype)
        for columns, _, total in sums:
            add_product(total, tile.t(), hidden[:, columns], first)
        first = False
    write_sums(sums, gradients.bias, sum_bias, empty=first)
    return losses


def _torch_block(
    tile: Tensor,
    teacher_tile: Tensor,
    head: Head,
    teacher: Head,
    mask: Tensor,
    row_weight: Tensor,
    divergence: Divergence,
    work: Workspace,
    teacher_work: Workspace,
) -> Tensor:
    """Turn raw logits [n, V] into the gradient of the weighted divergence in place; return that of each row, [n]."""
    losses = row_weight.new_empty(tile.shape[0])
    both = zip(cached_parts(tile, work), cached_parts(teacher_tile, teacher_work), strict=True)
    for (part, z, u, _, slope), (_, y, e, _, _) in both:
        final_logits_(z, head.of_rows(part), slope)
        final_logits_(y, teacher.of_rows(part))
        torch.log_softmax(z, -1, out=z)
        torch.log_softmax(y, -1, out=y)
        losses[part] = _divergence_(z, y.to(z.dtype), u, e, divergence)
        z.mul_(row_weight[part, None])
        apply_slope_(z, slope, head)
        tile[part].copy_(z.masked_fill_(~mask[part, None], 0))
    return losses.masked_fill_(~mask, 0)


def _divergence_(log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor, divergence: Divergence) -> Tensor:
    """Divergence [n] of log-probabilities [n, V]; ``log_q`` becomes its gradient, ``q`` and ``p`` are scratch."""
    kind, beta = divergence
    torch.exp(log_q, out=q)
    p = torch.exp(log_p, out=p) if p.dtype == log_p.dtype else torch.exp(log_p)
    gap = log_p - log_q
    if kind == "forward_kl":
        torch.sub(q, p, out=log_q)
        return _mean(p, gap)
    loss = torch.zeros_like(gap[:, 0])
    if kind == "reverse_kl":
        score = gap.neg_()
    else:
        log_beta, log_rest = gap.new_tensor(math.log(beta)), gap.new_tensor(math.log1p(-beta))
        loss = beta * _mean(p, -torch.logaddexp(log_beta, log_rest - gap))
        score = -torch.logaddexp(gap + log_beta, log_rest)
    mean = _mean(q, score)
    torch.mul(q, score.sub_(mean[:, None]), out=log_q).mul_(1 - beta).masked_fill_(q == 0, 0)
    return loss + (1 - beta) * mean


def _mean(p: Tensor, score: Tensor) -> Tensor:
    """``sum p score`` of each row; an entry without probability counts nothing, whatever its score."""
    return (p * score).masked_fill_(p == 0, 0).sum(-1)


@_divergence.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    input, head, _, _, row_weight, _, need, _ = _unpack(arguments)
    losses = row_weight.new_empty(input.shape[0])
    return losses.new_zeros(()), losses, *returned(gradient_buffers(input, head, need), input)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    total, losses, *gradients = output
    need = inputs[-6]
    ctx.set_materialize_grads(False)
    # where no gradient was formed along with them, rows get their weights from the backward pass
    ctx.mark_non_differentiable(losses if any(need) else total, *gradients)
    ctx.need, ctx.gradients = need, gradients if any(need) else None
    ctx.tensors = [isinstance(x, Tensor) for x in inputs]
    ctx.others = [x for x in inputs if not isinstance(x, Tensor)]
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))


def _backward(ctx: Any, g_total: Tensor | None, g_losses: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * (len(ctx.tensors) - 4)
    g = g_losses if g_total is None else g_total
    if g is None:
        return (None, None, None, None, *nothing)
    if ctx.gradients is not None:
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            gradient.mul_(g)
        return (*wanted_gradients(tuple(gradients), tuple(ctx.need)), *nothing)
    # per row, or a second backward pass through a retained graph: the first one gave the gradients away
    tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
    inputs = [next(tensors) if is_tensor else next(others) for is_tensor in ctx.tensors]
    inputs[-_REST] = g * inputs[-_REST] if g_losses is None else g.contiguous()
    need = inputs[-6] = list(ctx.needs_input_grad[:4])
    return (*wanted_gradients(tuple(_divergence(*inputs)[2:]), tuple(need)), *nothing)


_divergence.register_autograd(_backward, setup_context=_setup)


def linear_head_divergence(
    input: Tensor,
    head: Head,
    teacher: Teacher,
    mask: Tensor,
    row_weight: Tensor | None,
    divergence: Divergence,
    plan: Plan,
) -> Tensor:
    """The sum of the rows' divergences by their weights, with its gradients, or without weights each row's.

    Args:
        input: hidden states, [N, D].
        head: the head; at least one row of both models' logits must fit the workspace.
        teacher: the model to learn from.
        mask: rows that count, bool [N].
        row_weight: [N]; None for the divergence of every row, [N], whose backward pass recomputes the logits.
        divergence: which.
        plan: how.
    """
    factors = (input, head.weight, head.bias, head.low_rank)
    need = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in factors]
    if row_weight is None:
        weights, need = torch.zeros(input.shape[:1], dtype=head.stats_dtype, device=input.device), [False] * 4
    else:
        weights = row_weight
    models = (input, *head, teacher.input, *teacher.head, mask)
    total, losses, *_ = _divergence(*models, weights, *divergence, need, teacher.dtype, *plan)
    return losses if row_weight is None else total
