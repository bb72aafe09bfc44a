"""Which tiles of the vocabulary a backward pass may leave out, and what they would have added.

The forward pass records the softmax mass of every row in every tile. Each row gives up its lightest tiles, as many as
hold at most ``skip_tol`` of its mass together, and never the one with its target. A row that is near uniform
therefore keeps nearly all of its tiles. What does not go through the probabilities, the part of label smoothing that
is the same in every row, is added for the tiles left out: they cost no logits.

Shape key: N rows, D width, V vocabulary, T tiles of it; n rows of a block.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from litropy.kernels.linear_head_tiles import ranges
from litropy.kernels.linear_head_types import Cotangents, Gradients, Head, RowStats, Want
from litropy.kernels.tile_configs import tile_config

__all__ = ["TileMass", "add_skipped_smoothing", "select_tiles", "tile_of"]

# columns of a tile in the PyTorch implementation, where each row chooses for itself
_COLUMNS = 512
# tiles whose share of label smoothing is added by one product
_SMOOTHED_TILES = 8


def tile_of(impl: str, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns of the tiles that are kept or left out."""
    if impl == "torch":
        return 1, _COLUMNS
    config = tile_config(dtype, "hip" if torch.version.hip else "cuda")
    return config.block_n, config.block_v


class TileMass:
    """Logarithm of the softmax mass of each row in each tile, before it is known relative to what."""

    def __init__(self, num_rows: int, head: Head, columns: int) -> None:
        num_tiles = -(-head.weight.shape[0] // columns)
        self.columns = columns
        self.log_mass = head.weight.new_full((num_rows, num_tiles), -torch.inf, dtype=head.stats_dtype)

    def add(self, rows: Tensor | slice, e: Tensor, centre: Tensor, start: int) -> None:
        """Record ``e`` = exp(z - centre) [n, v] of the columns from ``start`` on, where a tile begins."""
        width = self.columns
        whole = e.shape[1] // width
        mass = e[:, : whole * width].unflatten(1, (whole, width)).sum(-1)
        if e.shape[1] % width:
            mass = torch.cat([mass, e[:, whole * width :].sum(-1, keepdim=True)], 1)
        first = start // width
        self.log_mass[rows, first : first + mass.shape[1]] = mass.log_().add_(centre[:, None])


def select_tiles(
    log_mass: Tensor,
    tile: tuple[int, int],
    vocabulary: int,
    stats: RowStats,
    target: Tensor | None,
    want: Want,
    skip_tol: float,
    budget: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Decide which tiles each block of rows keeps, [B, T] bool; writes ``skipped_mass`` and ``surviving_share``.

    A tile that holds half as much as if all entries were equally likely is kept, so that a near-uniform row gives
    nothing up. A tile counts with the row that has the most mass there. Where gradients of the entropy are to be had, a
    mass q counts ``log(columns / q) + H`` times, the most that its share of the entropy's gradient can be, or the
    square of it for the varentropy.

    Args:
        log_mass: logarithm of each row's mass in each tile, [N, T].
        tile: rows and columns of a tile. Tiles of one row are kept where their target is; in larger ones the backward
            pass adds targets by themselves.
        vocabulary: V; a narrower last tile counts as much as if it were whole, or every near-uniform row would give it
            up and its entries would lose all of their gradient.
        stats: the rows' statistics.
        target: token ids of this shard, [N]; an id beyond it belongs to another shard.
        want: the statistics that have been computed.
        skip_tol: the largest share of a row's mass that may be left out.
        budget: workspace in bytes.
        group: ranks that hold the other shards: each may give up an equal part.
    """
    (N, T), (height, width) = log_mass.shape, tile
    kept = torch.ones((-(-N // height), T), dtype=torch.bool, device=log_mass.device)
    tolerance = skip_tol / (1 if group is None else dist.get_world_size(group))
    power = 2 if want.varentropy else int(want.entropy)
    # half of what a tile holds where all entries are equally likely: a near-uniform row gives nothing up
    ordinary = 0.5 * width / max(1, vocabulary * (1 if group is None else dist.get_world_size(group)))
    step = max(1, budget // (64 * max(1, T)) // height)
    for blocks in ranges(len(kept), step):
        rows = slice(blocks.start * height, min(N, blocks.stop * height))
        share = (log_mass[rows] - stats.lse[rows, None]).exp()
        if target is not None:
            share = share.masked_fill((target[rows] < 0)[:, None], 0)
        cost = share
        if narrow := vocabulary % width:
            cost = torch.cat([cost[:, :-1], cost[:, -1:] * (width / narrow)], 1)
        is_ordinary = cost >= ordinary
        if power:
            bound = math.log(width) - share.clamp_min(torch.finfo(share.dtype).tiny).log() + stats.entropy[rows, None]
            cost = cost * bound.clamp_min(1) ** power
        cost = cost.masked_fill(is_ordinary, torch.inf)
        if height > 1:
            missing = (blocks.stop - blocks.start) * height - len(cost)
            cost = F.pad(cost, (0, 0, 0, missing)).unflatten(0, (-1, height)).amax(1)
        elif target is not None:
            at_target = (target[rows].clamp_min(0) // width)[:, None]
            cost = torch.where(torch.arange(T, device=cost.device) == at_target, torch.inf, cost)
        order = cost.argsort(1)
        # a comparison with NaN is false: a row that is not finite keeps everything
        light = cost.gather(1, order).cumsum(1) <= tolerance
        kept[blocks] = ~torch.zeros_like(light).scatter_(1, order, light)
        kept_rows = kept[blocks].repeat_interleave(height, 0)[: len(share)] if height > 1 else kept[blocks]
        stats.skipped_mass[rows] = share.masked_fill(kept_rows, 0).sum(1)
        stats.surviving_share[rows] = kept_rows.sum(1, dtype=share.dtype)
    if target is not None:
        stats.surviving_share.masked_fill_(target < 0, 0)
    tiles = torch.full_like(stats.lse, T)
    if group is not None:
        sums = torch.stack([stats.skipped_mass, stats.surviving_share, tiles])
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)
        stats.skipped_mass, stats.surviving_share, tiles = sums
    stats.surviving_share = stats.surviving_share / tiles
    return kept


def add_skipped_smoothing(
    kept: Tensor,
    width: int,
    input: Tensor,
    head: Head,
    target: Tensor | None,
    cotangents: Cotangents,
    gradients: Gradients,
    sum_input: Tensor | None,
) -> None:
    """Add ``g_mean_logprob c_v / T`` of the tiles that were left out, a product with one column a tile.

    Without a softcap a logit's slope is its row's inverse temperature, so the same number stands in the whole tile of
    a row but for the entry's weight c_v; with one, nothing has been left out. ``kept`` is [N, T], of tiles with
    ``width`` columns.
    """
    g = cotangents.mean_logprob
    if g is None or head.softcap:
        return
    V = head.weight.shape[0]
    scale = head.inv_temperature if head.row_inv_temperature is None else head.row_inv_temperature
    per_row = (g * scale)[:, None] * ~kept  # [N, T]
    if target is not None:
        per_row = per_row.masked_fill((target < 0)[:, None], 0)
    c = torch.full((V,), 1 / V, device=g.device, dtype=g.dtype) if head.mean_weight is None else head.mean_weight
    for columns in ranges(V, _SMOOTHED_TILES * width):
        tiles = slice(columns.start // width, -(-columns.stop // width))
        rows, c_v = per_row[:, tiles], c[columns].to(g.dtype)
        # the tile of each column, as a matrix: it turns sums over columns into one product
        tile = torch.arange(c_v.shape[0], device=c_v.device) // width
        members = torch.zeros((rows.shape[1], c_v.shape[0]), device=c_v.device, dtype=g.dtype)
        members.scatter_(0, tile[None], c_v[None])
        if sum_input is not None:
            for part, matrix in head.factors():
                sum_input[:, part] += rows @ (members @ matrix[columns].to(g.dtype))
        for part, out in gradients.factors(head):
            out[columns] += (members.t() @ (rows.t() @ input[:, part].to(g.dtype))).to(out.dtype)
        if gradients.bias is not None:
            gradients.bias[columns] += (members.t() @ rows.sum(0)).to(gradients.bias.dtype)
