"""Row sums of a linear head and their gradients in plain PyTorch, tile by tile: any device, any float dtype.

The forward pass merges tiles of logits into the rows' streaming sums (``linear_head_sums.py``); the backward pass
recomputes them (8 N D V floating-point operations in all)::

    dz_v = p_v (g_lse - g_logprob - g_mean C - g_H x + g_V (x^2 + 2 x - Vr)) + g_logprob [v = y] + g_mean c_v
           - [v in nucleus] g_S q_v (log q_v + H_S)        x = log p_v + H,  q_v = p_v / A

Shape key: N rows, D width, V vocabulary; n and v are the sizes of a tile.
"""

import torch
from torch import Tensor

from litropy.kernels.linear_head_nucleus import nucleus_factor, nucleus_gradient
from litropy.kernels.linear_head_skipping import TileMass, add_skipped_smoothing, tile_of
from litropy.kernels.linear_head_sums import Sums
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
from litropy.kernels.linear_head_types import Cotangents, Gradients, Head, RowStats, Want

__all__ = ["add_target_gradient_", "add_tile", "row_gradients", "row_sums"]

# exp of this is 0 in every dtype; in place of -inf, whose product with that 0 would be NaN
_NO_PROBABILITY = -1e4


def add_tile(
    sums: Sums, rows: slice, z: Tensor, u: Tensor, e: Tensor, start: int, head: Head, target: Tensor | None
) -> Tensor:
    """Merge final logits z [n, v] of the columns from ``start`` on into the sums of some rows, in order of columns.

    Leaves exp(z - centre) in ``e`` and returns the centre [n]; ``u`` is scratch.
    """
    top, m_old, V = z.amax(-1), sums.m[rows], head.weight.shape[0]
    if target is not None:
        local = target[rows] - start
        inside = (local >= 0) & (local < z.shape[1])
        picked = z.gather(1, local.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
        sums.z_target[rows] = torch.where(inside, picked, sums.z_target[rows])
        sums.found[rows] += inside
    if sums.argmax.numel():
        # strictly greater, so that a tie keeps the lower index
        sums.argmax[rows] = torch.where(top > m_old, z.argmax(-1) + start, sums.argmax[rows])
    seen: float | Tensor = start / V
    if head.mean_weight is not None and sums.r.numel():
        seen = head.mean_weight[:start].sum()
    centre = sums.move(rows, torch.maximum(m_old, top), seen)
    torch.sub(z, centre[:, None], out=u)
    torch.exp(u, out=e)
    mass, before = e.sum(-1), sums.s[rows].clone()
    sums.s[rows] += mass
    if sums.r.numel():
        if head.mean_weight is None:
            sums.r[rows] += u.sum(-1) / V
        else:  # an entry of weight 0 does not count, even where it has no probability
            c = head.mean_weight[start : start + z.shape[1]].to(u.dtype)
            sums.r[rows] += u.masked_fill(c == 0, 0) @ c
    if sums.b.numel():
        sums.b[rows] += (e * e).sum(-1)
    if sums.t.numel():
        u.clamp_(min=_NO_PROBABILITY)
        ue = u * e if sums.t2.numel() else torch.mul(u, e, out=u)
        moment = ue.sum(-1)
        if sums.bt.numel():
            sums.bt[rows] += (ue * e).sum(-1)
        if sums.t2.numel():
            mean = (moment / mass).masked_fill(mass == 0, 0)
            distance = (mean - sums.t[rows] / before).masked_fill((before == 0) | (mass == 0), 0)
            sums.t2[rows] += u.sub_(mean[:, None]).square_().mul_(e).sum(-1)
            sums.t2[rows] += distance.square() * (before * (mass / sums.s[rows])).masked_fill(before == 0, 0)
        sums.t[rows] += moment
    return centre


def row_sums(
    input: Tensor, head: Head, target: Tensor | None, want: Want, budget: int, skips: bool = False
) -> tuple[Sums, Tensor | None]:
    """Sum up every row of ``input`` [N, D] in a workspace of ``budget`` bytes.

    Returns:
        The sums, and with ``skips`` the logarithm of each row's mass in each tile of ``TILE`` columns.
    """
    N, V = input.shape[0], head.weight.shape[0]
    rows = Rows.of(input, target)
    width = tile_of("torch", head.weight.dtype)[1]
    n_max, v_max = tile_shape(rows, head, budget, width if skips else 1)
    work = Workspace(head, n_max, v_max, budget)
    sums = Sums.start((N,), input, head.stats_dtype, target is not None, want)
    masses = TileMass(N, head, width) if skips else None
    for index, hidden, block_target in rows.blocks(n_max):
        block = Sums.start((hidden.shape[0],), input, head.stats_dtype, target is not None, want)
        block_head = head.of_rows(index)
        for columns in ranges(V, v_max):
            tile = raw_logits(hidden, head, columns, work)
            for part, z, u, e, _ in cached_parts(tile, work):
                final_logits_(z, block_head.of_rows(part))
                centre = add_tile(block, part, z, u, e, columns.start, head, block_target)
                if masses is not None:
                    part_rows = index[part] if isinstance(index, Tensor) else _within(index, part)
                    masses.add(part_rows, e, centre, columns.start)
        for whole, mine in zip(vars(sums).values(), vars(block).values(), strict=True):
            if whole.numel():
                whole[index] = mine
    return sums, None if masses is None else masses.log_mass


def _within(outer: slice, inner: slice) -> slice:
    return slice(outer.start + inner.start, outer.start + inner.stop)


def row_gradients(
    input: Tensor,
    head: Head,
    target: Tensor | None,
    stats: RowStats,
    cotangents: Cotangents,
    gradients: Gradients,
    budget: int,
    kept: Tensor | None = None,
) -> None:
    """Add the gradients that are wanted to what is there.

    Sums that go over several tiles are kept in float32 and rounded once. Where a float32 sum for every row would not
    fit the workspace of ``budget`` bytes, input and weight are done one after the other, each with its own
    recomputation.

    Args:
        input: hidden states, [N, D].
        head: the head, [V, D].
        target: token ids, [N]; negative rows are ignored.
        stats: what the forward pass found.
        cotangents: what autograd wants to be multiplied.
        gradients: where to add.
        budget: workspace in bytes.
        kept: which tiles of ``TILE`` columns each row keeps, [N, T]; None for all.
    """
    if target is not None:
        cotangents = cotangents.zero_where(target < 0)
    d_input = gradients.input
    if d_input is not None and d_input.dtype != head.stats_dtype and d_input.numel() * 4 > budget // 8:
        for part in ranges(input.shape[0], max(1, budget // 8 // (4 * input.shape[1]))):
            _sweep(
                input[part],
                head.of_rows(part),
                None if target is None else target[part],
                stats.of_rows(part),
                cotangents.of_rows(part),
                Gradients(d_input[part], None, None, None),
                budget,
                None if kept is None else kept[part],
            )
        gradients = gradients._replace(input=None)
    if any(gradient is not None for gradient in gradients):
        _sweep(input, head, target, stats, cotangents, gradients, budget, kept)


def logit_gradient(
    z: Tensor, u: Tensor, e: Tensor, start: int, head: Head, target: Tensor | None, stats: RowStats, g: Cotangents
) -> Tensor:
    """Gradient of final logits z [n, v] of the columns from ``start`` on, written into ``e``; u is scratch."""
    torch.sub(z, stats.max_logit[:, None], out=u).add_(stats.shifted_max_logprob(target)[:, None])
    torch.exp(u, out=e)
    factor = g.of_p(stats.lse, head.mean_total)[:, None]
    few = None
    if g.nucleus_entropy is not None:
        u.clamp_(min=_NO_PROBABILITY)
        few = nucleus_gradient(z, u, e, stats, g.nucleus_entropy)
        if few is None:
            inside = nucleus_factor(u, stats, g.nucleus_entropy).add_(factor)
            factor = torch.where(z < stats.nucleus_boundary[:, None], factor, inside)
    if g.entropy is not None or g.varentropy is not None:
        u.clamp_(min=_NO_PROBABILITY).add_(stats.entropy[:, None])
        if g.varentropy is not None:
            factor = factor + (u * (u + 2) - stats.varentropy[:, None]).mul_(g.varentropy[:, None])
        if g.entropy is not None:
            factor = torch.mul(u, -g.entropy[:, None], out=u).add_(factor)
    e.mul_(factor)
    if few is not None:
        entries, gradient = few
        e[entries] += gradient
    return add_target_gradient_(e, start, head, target, g)


def add_target_gradient_(dz: Tensor, start: int, head: Head, target: Tensor | None, g: Cotangents) -> Tensor:
    """Add what does not go through the probabilities: ``g_logprob [v = y] + g_mean_logprob c_v``, in place."""
    if g.mean_logprob is not None:
        if head.mean_weight is None:
            dz.add_(g.mean_logprob[:, None] / head.weight.shape[0])
        else:
            c = head.mean_weight[start : start + dz.shape[1]].to(dz.dtype)
            dz.addcmul_(g.mean_logprob[:, None].to(dz.dtype), c)
    if g.logprob is not None and target is not None:
        local = target - start
        inside = (local >= 0) & (local < dz.shape[1])
        picked = torch.where(inside, g.logprob, 0.0).to(dz.dtype)
        dz.scatter_add_(1, local.clamp(0, dz.shape[1] - 1)[:, None], picked[:, None])
    return dz


class _Sum:
    """A sum over tiles that is added to a gradient and rounded once: in place where its dtype is exact enough."""

    def __init__(self, out: Tensor, dtype: torch.dtype, parts: int) -> None:
        self.out = out
        self.total = out if out.dtype == dtype or parts == 1 else torch.zeros_like(out, dtype=dtype)

    def add(self, value: Tensor) -> None:
        self.total += value

    def add_product(
        self, a: Tensor, b: Tensor, rows: Tensor | slice = slice(None), columns: slice = slice(None)
    ) -> None:
        if isinstance(rows, slice) and self.total.dtype == a.dtype:
            self.total[rows, columns].addmm_(a, b)
        else:
            self.total[rows, columns] += torch.mm(a, b)

    def round(self) -> None:
        if self.total is not self.out:
            self.out += self.total


def _sweep(
    input: Tensor,
    head: Head,
    target: Tensor | None,
    stats: RowStats,
    cotangents: Cotangents,
    gradients: Gradients,
    budget: int,
    kept: Tensor | None,
) -> None:
    """One recomputation of all tiles, vocabulary outside and rows inside."""
    V = head.weight.shape[0]
    all_rows = Rows.of(input, target)
    width = tile_of("torch", head.weight.dtype)[1]
    n_max, v_max = tile_shape(all_rows, head, budget, 1 if kept is None else width, gathers=kept is not None)
    if kept is not None:
        v_max = width
    work = Workspace(head, n_max, v_max, budget)
    num_columns = -(-V // v_max)
    sum_input = None if gradients.input is None else _Sum(gradients.input, head.stats_dtype, num_columns)
    for columns in ranges(V, v_max):
        rows = all_rows if kept is None else all_rows.among(kept[:, columns.start // width])
        num_blocks = -(-len(rows) // n_max)
        weights = [
            (factor, _Sum(out[columns], head.stats_dtype, num_blocks)) for factor, out in gradients.factors(head)
        ]
        sum_bias = None if gradients.bias is None else _Sum(gradients.bias[columns], head.stats_dtype, parts=2)
        for index, hidden, block_target in rows.blocks(n_max):
            tile = raw_logits(hidden, head, columns, work)
            block_stats, block_cotangents, block_head = (
                stats.of_rows(index),
                cotangents.of_rows(index),
                head.of_rows(index),
            )
            for part, z, u, e, slope in cached_parts(tile, work):
                final_logits_(z, block_head.of_rows(part), slope)
                part_target = None if block_target is None else block_target[part]
                dz = logit_gradient(
                    z, u, e, columns.start, head, part_target, block_stats.of_rows(part), block_cotangents.of_rows(part)
                )
                apply_slope_(dz, slope, head)
                if sum_bias is not None:
                    sum_bias.add(dz.sum(0))
                tile[part].copy_(dz)
            for factor, total in weights:
                total.add_product(tile.t(), hidden[:, factor])
            if sum_input is not None:
                for factor, matrix in head.factors():
                    sum_input.add_product(tile, matrix[columns], index, factor)
        for total in (*(total for _, total in weights), *([] if sum_bias is None else [sum_bias])):
            total.round()
    if kept is not None:
        target_sum = None if sum_input is None else sum_input.total
        add_skipped_smoothing(kept, width, input, head, target, cotangents, gradients, target_sum)
    if sum_input is not None:
        sum_input.round()
