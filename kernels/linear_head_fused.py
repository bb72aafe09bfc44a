"""Loss and gradients of a linear head in one pass of plain PyTorch, for losses that weigh each row by a known number.

A block of whole rows of logits fits the workspace, so its softmax gradient follows at once and nothing is recomputed:
6 N D V floating-point operations instead of the 8 of statistics followed by a backward pass. The gradients are those
of ``sum_n row_weight_n ((1 - s) nll + s mean_v(-log p_v) + z_loss lse^2)``; what autograd multiplies them by comes
later.

Shape key: N rows, D width, V vocabulary; n is the number of rows in a block.
"""

import torch
from torch import Tensor

from litropy.kernels.linear_head_tiles import (
    Rows,
    Workspace,
    apply_slope_,
    cached_parts,
    final_logits_,
    logit_elements,
    raw_logits,
    scratch_elements,
)
from litropy.kernels.linear_head_torch import StreamingState, add_target_gradient_
from litropy.kernels.linear_head_types import Head, RowStats, Want, loss_cotangents

__all__ = ["fused_gradients", "fused_rows"]

# fewer rows than this leave the matrix products bound by the traffic of the weight
_MIN_ROWS = 32
# a half-precision weight gradient is rounded once a block; more roundings than this could exceed the error budget
_MAX_HALF_ROUNDINGS = 6


def fused_rows(num_rows: int, head: Head, budget: int) -> int:
    """Rows in a block of whole rows, or 0 where statistics followed by a backward pass are the better way."""
    V = head.weight.shape[0]
    if head.weight.dtype == torch.float16:
        # the scale of a loss scaler comes with the backward pass only: by then small gradients would be 0
        return 0
    n = min(num_rows, logit_elements(head, budget) // V)
    if not n or n < min(num_rows, _MIN_ROWS) or scratch_elements(budget) < V:
        return 0
    # blocks of about equal size, in multiples of 16 rows, which matrix libraries like
    num_blocks = -(-num_rows // n)
    n = min(n, -(-num_rows // (16 * num_blocks)) * 16)
    return 0 if head.weight.dtype != head.stats_dtype and n * _MAX_HALF_ROUNDINGS < num_rows else n


def fused_gradients(
    input: Tensor,
    head: Head,
    target: Tensor,
    row_weight: Tensor,
    label_smoothing: float,
    z_loss: float,
    want: Want,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    budget: int,
) -> RowStats:
    """Return the statistics of every row and write the gradients that are given.

    Args:
        input: hidden states, [N, D].
        head: the head, [V, D]; ``fused_rows`` must not be 0.
        target: token ids, [N]; negative rows are ignored.
        row_weight: weight of each row's loss, [N].
        label_smoothing: s in the formula above.
        z_loss: factor of the squared log-sum-exp.
        want: optional statistics.
        gradients: of input [N, D], zero-initialised, weight [V, D] and bias [V].
        budget: workspace in bytes.
    """
    d_input, d_weight, d_bias = gradients
    V = head.weight.shape[0]
    rows = Rows.of(input, target)
    n_max = fused_rows(len(rows), head, budget) or 1
    assert n_max > 1 or len(rows) <= 1, "whole rows do not fit the budget"
    work = Workspace(head, n_max, V, budget)
    sum_bias = None if d_bias is None else torch.zeros_like(d_bias, dtype=head.stats_dtype)
    stats = RowStats.zeros(input.shape[0], input, head.stats_dtype, True, want)
    first = True
    for index, hidden, block_target in rows.blocks(n_max):
        assert block_target is not None
        tile = raw_logits(hidden, head, slice(0, V), work)
        block_stats = stats[index]
        weight, inv_temperature = row_weight[index], head.row_scale(index)
        for part, z, u, e, slope in cached_parts(tile, work):
            final_logits_(z, head, None if inv_temperature is None else inv_temperature[part], slope)
            state = StreamingState(z.shape[0], head, want)
            state.add(slice(None), z, u, e, 0, block_target[part])
            part_stats = state.finish(block_target[part], V)
            block_stats.put(part, part_stats)
            cotangents = loss_cotangents(weight[part], part_stats.lse, label_smoothing, z_loss)
            e.mul_((cotangents.of_p(part_stats.lse) / state.s)[:, None])
            add_target_gradient_(e, 0, V, block_target[part], cotangents)
            apply_slope_(e, slope, head)
            if sum_bias is not None:
                sum_bias += e.sum(0)
            tile[part].copy_(e)
        stats.put(index, block_stats)
        if d_input is not None:
            d_input[index] = torch.mm(tile, head.weight)
        if d_weight is not None:
            # the first product overwrites what is there, which saves filling a [V, D] tensor with zeros
            d_weight.addmm_(tile.t(), hidden, beta=0 if first else 1)
        first = False
    if first and d_weight is not None:
        d_weight.zero_()
    if d_bias is not None and sum_bias is not None:
        d_bias.copy_(sum_bias)
    return stats
