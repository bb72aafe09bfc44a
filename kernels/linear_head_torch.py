"""Row statistics of a linear head and their gradients in plain PyTorch, tile by tile: any device, any float dtype.

Tiles of logits are merged into the rows' streaming state, centred at the running maximum m, with u = z - m (README.md
in this folder has the derivation)::

    s = sum exp u      t = sum u exp u      r = sum u
    lse = m + log s    H = log s - t / s    mean_v log p_v = r / V - log s

and the backward pass recomputes them (8 N D V floating-point operations in all)::

    dz_v = p_v (g_lse - g_logprob - g_mean - g_H (log p_v + H)) + g_logprob [v = y] + g_mean / V

Shape key: N rows, D width, V vocabulary; n and v are the sizes of a tile.
"""

import math

import torch
from torch import Tensor

from litropy.kernels.linear_head_tiles import (
    Rows,
    Workspace,
    apply_slope_,
    cached_parts,
    final_logits_,
    ranges,
    raw_logits,
    tile_shape,
)
from litropy.kernels.linear_head_types import Cotangents, Head, RowStats, Want

__all__ = ["StreamingState", "add_target_gradient_", "row_gradients", "row_statistics"]


class StreamingState:
    """Streaming sums of n rows, whose tiles of logits come in the order of their columns."""

    def __init__(self, n: int, head: Head, want: Want) -> None:
        self.want = want
        self.m = head.weight.new_full((n,), -math.inf, dtype=head.stats_dtype)
        self.s, self.t, self.r, self.z_target = (torch.zeros_like(self.m) for _ in range(4))
        self.argmax = torch.zeros_like(self.m, dtype=torch.int64)

    def add(self, rows: slice, z: Tensor, u: Tensor, e: Tensor, start: int, target: Tensor | None) -> None:
        """Merge final logits z [n, v] of the columns from ``start`` on; leaves exp(z - m) in ``e``, u is scratch."""
        top = z.amax(-1)
        m_old, s_old = self.m[rows], self.s[rows]
        m = torch.maximum(m_old, top)
        # rows that have seen only -inf are centred at 0: their sums stay 0 instead of NaN
        centre = m.masked_fill(m == -math.inf, 0.0)
        shift = (m_old - centre).masked_fill(m_old == -math.inf, 0.0)
        decay = shift.exp()
        if target is not None:
            local = target[rows] - start
            inside = (local >= 0) & (local < z.shape[1])
            picked = z.gather(1, local.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
            self.z_target[rows] = torch.where(inside, picked, self.z_target[rows])
        if self.want.argmax:
            # strictly greater, so that a tie keeps the lower index
            self.argmax[rows] = torch.where(top > m_old, z.argmax(-1) + start, self.argmax[rows])
        torch.sub(z, centre[:, None], out=u)
        torch.exp(u, out=e)
        if self.want.mean_logprob:
            self.r[rows] += start * shift + u.sum(-1)
        if self.want.entropy:
            # exp(-inf) * -inf would be NaN; any finite number in its place gives the 0 it should be
            torch.mul(u.clamp_(min=torch.finfo(u.dtype).min), e, out=u)
            self.t[rows] = (self.t[rows] + s_old * shift) * decay + u.sum(-1)
        self.s[rows] = s_old * decay + e.sum(-1)
        self.m[rows] = m

    def finish(self, target: Tensor | None, vocabulary: int) -> RowStats:
        """Turn the sums into statistics; ignored rows get 0, a target outside the vocabulary NaN."""
        log_s = self.s.log()
        empty = log_s[:0]
        stats = RowStats(
            logprob=empty,
            lse=self.m + log_s,
            max_logit=self.m,
            max_logprob=-log_s,
            entropy=log_s - self.t / self.s if self.want.entropy else empty,
            mean_logprob=self.r / vocabulary - log_s if self.want.mean_logprob else empty,
            argmax=self.argmax if self.want.argmax else self.argmax[:0],
        )
        if target is not None:
            stats.logprob = (self.z_target - self.m - log_s).masked_fill(target >= vocabulary, math.nan)
            stats.zero_where(target < 0)
        return stats


def row_statistics(input: Tensor, head: Head, target: Tensor | None, want: Want, budget: int) -> RowStats:
    """Compute the statistics of every row of ``input`` [N, D] in a workspace of ``budget`` bytes."""
    V = head.weight.shape[0]
    rows = Rows.of(input, target)
    n_max, v_max = tile_shape(rows, head, budget)
    work = Workspace(head, n_max, v_max, budget)
    stats = RowStats.zeros(input.shape[0], input, head.stats_dtype, target is not None, want)
    for index, hidden, block_target in rows.blocks(n_max):
        state = StreamingState(hidden.shape[0], head, want)
        inv_temperature = head.row_scale(index)
        for columns in ranges(V, v_max):
            tile = raw_logits(hidden, head, columns, work)
            for part, z, u, e, _ in cached_parts(tile, work):
                final_logits_(z, head, None if inv_temperature is None else inv_temperature[part])
                state.add(part, z, u, e, columns.start, block_target)
        stats.put(index, state.finish(block_target, V))
    return stats


def row_gradients(
    input: Tensor,
    head: Head,
    target: Tensor | None,
    stats: RowStats,
    cotangents: Cotangents,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    budget: int,
) -> None:
    """Write the gradients of input [N, D], weight [V, D] and bias [V] that are given, zero-initialised.

    Sums that go over several tiles are kept in float32 and rounded once. Where a float32 sum for every row would not
    fit the workspace of ``budget`` bytes, input and weight are done one after the other, each with its own
    recomputation.
    """
    d_input, d_weight, d_bias = gradients
    if target is not None:
        cotangents = cotangents.zero_where(target < 0)
    is_half = input.dtype != head.stats_dtype
    if d_input is not None and is_half and d_input.numel() * 4 > budget // 8:
        for part in ranges(input.shape[0], max(1, budget // 8 // (4 * input.shape[1]))):
            sub_head = Head(head.weight, head.bias, head.inv_temperature, head.row_scale(part), head.softcap)
            sub_target = None if target is None else target[part]
            _sweep(
                input[part], sub_head, sub_target, stats[part], cotangents[part], (d_input[part], None, None), budget
            )
        d_input = None
    if not all(gradient is None for gradient in (d_input, d_weight, d_bias)):
        _sweep(input, head, target, stats, cotangents, (d_input, d_weight, d_bias), budget)


def logit_gradient(
    z: Tensor,
    u: Tensor,
    e: Tensor,
    start: int,
    vocabulary: int,
    target: Tensor | None,
    stats: RowStats,
    cotangents: Cotangents,
) -> Tensor:
    """Gradient of final logits z [n, v] of the columns from ``start`` on, written into ``e``; u is scratch."""
    # an ignored row has no statistics; -inf makes its probabilities 0
    max_logprob = stats.max_logprob if target is None else stats.max_logprob.masked_fill(target < 0, -math.inf)
    torch.sub(z, stats.max_logit[:, None], out=u).add_(max_logprob[:, None])
    torch.exp(u, out=e)
    factor = cotangents.of_p(stats.lse)[:, None]
    if cotangents.entropy is None:
        e.mul_(factor)
    else:
        u.clamp_(min=torch.finfo(u.dtype).min).add_(stats.entropy[:, None]).mul_(-cotangents.entropy[:, None]).add_(
            factor
        )
        e.mul_(u)
    return add_target_gradient_(e, start, vocabulary, target, cotangents)


def add_target_gradient_(
    dz: Tensor, start: int, vocabulary: int, target: Tensor | None, cotangents: Cotangents
) -> Tensor:
    """Add what does not go through the probabilities: ``g_logprob [v = y] + g_mean_logprob / V``, in place."""
    if cotangents.mean_logprob is not None:
        dz.add_(cotangents.mean_logprob[:, None] / vocabulary)
    if cotangents.logprob is not None and target is not None:
        local = target - start
        inside = (local >= 0) & (local < dz.shape[1])
        picked = torch.where(inside, cotangents.logprob, 0.0).to(dz.dtype)
        dz.scatter_add_(1, local.clamp(0, dz.shape[1] - 1)[:, None], picked[:, None])
    return dz


class _Sum:
    """A sum over tiles into a zero-initialised gradient, rounded once: in place where its dtype is exact enough."""

    def __init__(self, out: Tensor, dtype: torch.dtype, parts: int) -> None:
        self.out = out
        self.total = out if out.dtype == dtype or parts == 1 else torch.zeros_like(out, dtype=dtype)

    def add(self, value: Tensor) -> None:
        self.total += value

    def add_product(self, a: Tensor, b: Tensor, index: Tensor | slice = slice(None)) -> None:
        if isinstance(index, slice) and self.total.dtype == a.dtype:
            self.total[index].addmm_(a, b)
        else:
            self.total[index] += torch.mm(a, b)

    def round(self) -> None:
        if self.total is not self.out:
            self.out.copy_(self.total)


def _sweep(
    input: Tensor,
    head: Head,
    target: Tensor | None,
    stats: RowStats,
    cotangents: Cotangents,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    budget: int,
) -> None:
    """One recomputation of all tiles, vocabulary outside and rows inside."""
    d_input, d_weight, d_bias = gradients
    V = head.weight.shape[0]
    rows = Rows.of(input, target)
    n_max, v_max = tile_shape(rows, head, budget)
    work = Workspace(head, n_max, v_max, budget)
    num_blocks, num_columns = -(-len(rows) // n_max), -(-V // v_max)
    sum_input = None if d_input is None else _Sum(d_input, head.stats_dtype, num_columns)
    for columns in ranges(V, v_max):
        sum_weight = None if d_weight is None else _Sum(d_weight[columns], head.stats_dtype, num_blocks)
        sum_bias = None if d_bias is None else _Sum(d_bias[columns], head.stats_dtype, parts=2)
        for index, hidden, block_target in rows.blocks(n_max):
            tile = raw_logits(hidden, head, columns, work)
            block_stats, block_cotangents, inv_temperature = stats[index], cotangents[index], head.row_scale(index)
            for part, z, u, e, slope in cached_parts(tile, work):
                final_logits_(z, head, None if inv_temperature is None else inv_temperature[part], slope)
                part_target = None if block_target is None else block_target[part]
                dz = logit_gradient(z, u, e, columns.start, V, part_target, block_stats[part], block_cotangents[part])
                apply_slope_(dz, slope, head)
                if sum_bias is not None:
                    sum_bias.add(dz.sum(0))
                tile[part].copy_(dz)
            if sum_weight is not None:
                sum_weight.add_product(tile.t(), hidden)
            if sum_input is not None:
                sum_input.add_product(tile, head.weight[columns], index)
        for total in (sum_weight, sum_bias):
            if total is not None:
                total.round()
    if sum_input is not None:
        sum_input.round()
