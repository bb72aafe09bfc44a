"""Loss and gradients of a linear head in one pass, for losses that weigh each row by a known number.

A block of whole rows of logits fits the workspace, so its softmax gradient follows at once and nothing is recomputed:
6 N D V floating-point operations instead of the 8 of statistics followed by a backward pass. The gradients are those
of ``sum_n row_weight_n row_loss_n``; what autograd multiplies them by comes later.

Shape key: N rows, D width, V vocabulary; n is the number of rows in a block.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from litropy.kernels.linear_head_sums import Sums, finish_sums
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
from litropy.kernels.linear_head_torch import add_target_gradient_, add_tile
from litropy.kernels.linear_head_types import Gradients, Head, RowStats, Want, loss_cotangents

__all__ = [
    "BlockGradient", "RowLoss", "accumulator", "add_product", "fused_gradients", "pays", "rows_that_fit",
    "write_sums",
]  # fmt: skip

# fewer rows than this leave the matrix products bound by the traffic of the weight
_MIN_ROWS = {"cpu": 32, "cuda": 1024}
# more rows than this only move logits out of a CPU's caches
_CACHED_ROWS = 512
# a half-precision weight gradient is rounded once a block; more roundings than this could exceed the error budget
_MAX_HALF_ROUNDINGS = 6


class RowLoss(NamedTuple):
    """A row's loss and its weight: ``row_weight ((1 - s) w_y nll + s sum_v c_v (-log p_v) + z_loss lse^2)``."""

    row_weight: Tensor  # [N]
    nll_weight: Tensor | None = None  # [N], w_y
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def of_rows(self, rows: Tensor | slice) -> "RowLoss":
        """The loss of some rows."""
        nll_weight = None if self.nll_weight is None else self.nll_weight[rows]
        return self._replace(row_weight=self.row_weight[rows], nll_weight=nll_weight)


def rows_that_fit(num_rows: int, vocabulary: int, dtype: torch.dtype, budget: int) -> int:
    """The greatest number of whole rows of logits in the workspace, in blocks of about equal size; 0 if none fits.

    Args:
        num_rows: N.
        vocabulary: V.
        dtype: dtype of the matrix products.
        budget: workspace in bytes.
    """
    n = min(num_rows, logit_elements(dtype, budget) // max(1, vocabulary))
    if not n or scratch_elements(budget) < vocabulary:
        return 0
    num_blocks = -(-num_rows // n)
    # multiples of 16 rows, which matrix libraries like
    return min(n, -(-num_rows // (16 * num_blocks)) * 16)


def pays(
    num_rows: int, vocabulary: int, dtype: torch.dtype, gradient_dtype: torch.dtype, device: str, budget: int
) -> bool:
    """Whether blocks are so large that one pass beats statistics followed by a backward pass, and exact enough.

    Args:
        num_rows: N.
        vocabulary: V.
        dtype: dtype of the matrix products.
        gradient_dtype: dtype of the weight's gradient.
        device: type of the device.
        budget: workspace in bytes.
    """
    n = rows_that_fit(num_rows, vocabulary, dtype, budget)
    if n < min(num_rows, _MIN_ROWS.get(device, 1024)):
        return False
    is_exact = gradient_dtype in (torch.float32, torch.float64)
    return is_exact or n * _MAX_HALF_ROUNDINGS >= num_rows


BlockGradient = Callable[[Tensor, Head, Tensor, RowLoss, Want, Workspace, Tensor | None], RowStats]


def fused_gradients(
    input: Tensor,
    head: Head,
    target: Tensor,
    loss: RowLoss,
    want: Want,
    gradients: Gradients,
    budget: int,
    block_gradient: BlockGradient | None = None,
) -> RowStats:
    """Return the statistics of every row and write the gradients that are wanted.

    Args:
        input: hidden states, [N, D].
        head: the head, [V, D]; at least one row must fit the workspace.
        target: token ids, [N]; negative rows are ignored.
        loss: what each row's loss is.
        want: optional statistics.
        gradients: of input, weight, bias and low-rank matrix; the weight's may be uninitialised, the others are 0.
        budget: workspace in bytes.
        block_gradient: turns a block of raw logits into their gradient in place; None for PyTorch's own operations.
    """
    V = head.weight.shape[0]
    rows = Rows.of(input, target)
    # full precision loses nothing by weighting hidden states and dInput [n, D] in place of logits [n, V]
    is_full = block_gradient is None and head.weight.dtype == head.stats_dtype
    n_max = rows_that_fit(len(rows), V, head.weight.dtype, budget) or 1
    if is_full and input.device.type == "cpu":
        n_max = min(n_max, _CACHED_ROWS)
    work = Workspace(head, n_max, V, budget)
    num_blocks = -(-len(rows) // n_max)
    sum_bias = None if gradients.bias is None else torch.zeros_like(gradients.bias, dtype=head.stats_dtype)
    sums = [(columns, out, accumulator(out, head, num_blocks)) for columns, out in gradients.factors(head)]
    stats = RowStats.zeros(input.shape[0], input, head.stats_dtype, True, want)
    first = True
    for index, hidden, block_target in rows.blocks(n_max):
        assert block_target is not None
        tile, block_loss = raw_logits(hidden, head, slice(0, V), work), loss.of_rows(index)
        scale = None
        if is_full and sum_bias is None:
            scale = block_loss.row_weight[:, None]
            hidden, block_loss = hidden * scale, block_loss._replace(row_weight=torch.ones_like(block_loss.row_weight))
        block = (tile, head.of_rows(index), block_target, block_loss, want, work, sum_bias)
        found = block_gradient(*block) if block_gradient else _torch_block_gradient(*block, scale is not None)
        stats.put(index, found)
        if gradients.input is not None:
            for columns, matrix in head.factors():
                product = torch.mm(tile, matrix)
                if scale is not None:
                    product.mul_(scale)
                gradients.input[index, columns] = product.to(gradients.input.dtype)
        for columns, _, total in sums:
            add_product(total, tile.t(), hidden[:, columns], first)
        first = False
    write_sums(sums, gradients.bias, sum_bias, empty=first)
    return stats


def accumulator(out: Tensor, head: Head, num_blocks: int) -> Tensor:
    """Where to sum up a matrix's gradient: in place if its dtype stands the roundings, else in float32."""
    if out.dtype == head.stats_dtype or num_blocks <= _MAX_HALF_ROUNDINGS:
        return out
    return torch.empty_like(out, dtype=head.stats_dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``total += a @ b``; the first product overwrites, which saves filling a [V, D] tensor with zeros."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif total.device.type == "cuda" and total.dtype == torch.float32:
        torch.addmm(total, a, b, beta=0 if first else 1, out_dtype=torch.float32, out=total)
    elif first:
        total.copy_(torch.mm(a, b))
    else:
        total += torch.mm(a, b)


def write_sums(
    sums: list[tuple[slice, Tensor, Tensor]], bias: Tensor | None, sum_bias: Tensor | None, empty: bool
) -> None:
    """Write what the blocks added up to the matrices' gradients, unless it is there already, and to the bias's.

    Args:
        sums: columns, gradient and accumulator of each matrix.
        bias: gradient of the bias.
        sum_bias: its accumulator.
        empty: whether there was no block, which leaves accumulators undefined.
    """
    for _, out, total in sums:
        if empty:
            out.zero_()
        elif total is not out:
            out.copy_(total)
    if bias is not None and sum_bias is not None:
        bias.copy_(sum_bias)


def _torch_block_gradient(
    tile: Tensor,
    head: Head,
    target: Tensor,
    loss: RowLoss,
    want: Want,
    work: Workspace,
    sum_bias: Tensor | None,
    unweighted: bool,
) -> RowStats:
    """Turn raw logits [n, V] into their gradient in place; add that of the bias; return the rows' statistics.

    ``unweighted`` says that every row's weight is 1.
    """
    stats = RowStats.zeros(tile.shape[0], tile, head.stats_dtype, True, want)
    is_plain = not any(want)
    in_place = is_plain and not work.is_half and not head.has_slope
    whole = (slice(0, tile.shape[0]), tile, tile, tile, tile)
    for part, z, u, e, slope in [whole] if in_place else cached_parts(tile, work):
        final_logits_(z, head.of_rows(part), slope)
        if not is_plain:
            sums = Sums.start((z.shape[0],), z, head.stats_dtype, True, want)
            add_tile(sums, slice(None), z, u, e, 0, head, target[part])
            stats.put(part, finish_sums(sums, target[part], 1.0 if head.mean_total is None else head.mean_total, want))
        # last, so that loss and gradient have the same bits whatever else is asked for
        dz, found = z, _softmax_(z, target[part])
        stats.put(part, found)
        weight, nll_weight, label_smoothing, z_loss = loss.of_rows(part)
        cotangents = loss_cotangents(weight, nll_weight, found.lse, label_smoothing, z_loss)
        if not unweighted or nll_weight is not None or z_loss:  # else the factor of every probability is 1
            dz.mul_(cotangents.of_p(found.lse, head.mean_total)[:, None])
        add_target_gradient_(dz, 0, head, target[part], cotangents)
        apply_slope_(dz, slope, head)
        if sum_bias is not None:
            sum_bias += dz.sum(0)
        tile[part].copy_(dz)
    return stats


def _softmax_(z: Tensor, target: Tensor) -> RowStats:
    """Turn final logits [n, V] into probabilities in place; the statistics that every loss needs.

    PyTorch's softmax is one pass over a row; the likeliest entry's probability, 1 / sum exp(z - max), tells the rest.
    """
    V = z.shape[1]
    inside = (target >= 0) & (target < V)
    picked = z.gather(1, target.clamp(0, V - 1)[:, None])[:, 0]
    max_logit = z.amax(-1)
    torch.softmax(z, -1, out=z)
    max_logprob = z.amax(-1).log_()
    logprob = (picked - max_logit + max_logprob).masked_fill_(~inside, math.nan)
    stats = RowStats(logprob=logprob, lse=max_logit - max_logprob, max_logit=max_logit, max_logprob=max_logprob)
    stats.zero_where(target < 0)
    return stats
