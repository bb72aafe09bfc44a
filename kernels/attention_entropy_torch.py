"""Attention entropy and its gradient in plain PyTorch, tile by tile: any device, any float dtype.

A tile is a block of selected rows against a block of keys, for some of the batch and all heads. The backward pass
recomputes tiles; with p_j = exp z_j / sum exp z::

    dz_j = p_j (g_lse - g_H (log p_j + H))      da_j = dz_j (1 - tanh^2(a_j / softcap))
    dq = scale sum_j da_j k_j                   dk_j = scale sum_i da_ij q_i

Shape key: B batch, H query heads, G query heads that share a key head, R selected rows, D width; r and n are the rows
and keys of a tile.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from litropy.kernels.attention_entropy_sums import NO_PROBABILITY, Sums, finish
from litropy.kernels.attention_entropy_types import (
    Attention,
    RowStats,
    RowTerms,
    hiding_bias,
    ranges,
    select_rows,
    stats_dtype,
)

__all__ = ["row_gradients", "row_stats", "without_nan"]

# logits of a tile: with its temporaries it stays in a core's cache
_TILE = 1 << 17
_ROWS = 32
_UNKNOWN = 1 << 62


class _Rows(NamedTuple):
    """A block of selected rows."""

    block: slice
    q: Tensor  # [B, H, r, D], times the scale, in the dtype of the sums
    queries: Tensor | None  # which ones, [B or 1, r]; None for ``block``
    position: Tensor  # [B or 1, r], on the axis of keys
    least: int  # positions are between these two
    most: int

    def of(self, x: Tensor) -> Tensor:
        """The rows of x [B or 1, X, Tq or 1, n]."""
        return select_rows(x, self.queries) if self.queries is not None or x.shape[2] == 1 else x[:, :, self.block]

    def keys(self, attention: Attention) -> tuple[int, int]:
        """First key that any of the rows may see, and the one after the last."""
        start, stop = 0, attention.k.shape[2]
        if attention.prefix is not None:
            return start, stop
        if attention.causal:
            stop = min(stop, self.most + 1)
        if attention.window:
            start = max(start, self.least - attention.window + 1)
            stop = min(stop, self.most + attention.window)
        return start, stop


def _row_blocks(q: Tensor, rows: Tensor | None, attention: Attention, size: int) -> list[_Rows]:
    Tq, offset = q.shape[2], attention.k.shape[2] - q.shape[2]
    num_rows = Tq if rows is None else rows.shape[1]
    blocks = []
    for block in ranges(0, num_rows, size):
        index = None if rows is None else rows[:, block]
        if index is None:
            position = torch.arange(block.start + offset, block.stop + offset, device=q.device)[None]
            least, most = block.start + offset, block.stop + offset - 1
        else:
            position, least, most = index + offset, -_UNKNOWN, _UNKNOWN
            if q.device.type == "cpu":  # elsewhere, reading them would wait for the device
                least, most = int(position.min()), int(position.max())
        part = q[:, :, block] if index is None else select_rows(q, index)
        scaled = part.to(stats_dtype(q.dtype)) * attention.scale
        blocks.append(_Rows(block, scaled, index, position, least, most))
    return blocks


def _visible(rows: _Rows, attention: Attention, keys: slice, bias: Tensor | None) -> Tensor | None:
    """Which keys of a tile are visible, broadcastable to [B, H, r, n]; None if all are."""
    a, seen = attention, None
    p = rows.position[:, None, :, None]
    j = torch.arange(keys.start, keys.stop, device=p.device)

    def both(x: Tensor | None, y: Tensor) -> Tensor:
        return y if x is None else x & y

    if a.causal and keys.stop - 1 > rows.least:
        seen = both(seen, j <= p)
    if a.window and keys.start <= rows.most - a.window:
        seen = both(seen, j > p - a.window)
    if a.window and not a.causal and keys.stop - 1 >= rows.least + a.window:
        seen = both(seen, j < p + a.window)
    if a.prefix is not None and seen is not None:
        seen = seen | (j < a.prefix[:, None, None, None])
    if a.segments is not None and a.key_segments is not None:
        segments = rows.of(a.segments[:, None, :, None])
        seen = both(seen, segments == a.key_segments[:, None, None, keys])
    if a.key_mask is not None:
        seen = both(seen, a.key_mask[:, None, None, keys])
    if a.mask is not None:
        seen = both(seen, rows.of(a.mask[..., keys]))
    if bias is not None:
        seen = both(seen, ~(bias <= hiding_bias(bias.dtype)))
    return seen


class _Tile(NamedTuple):
    """Logits of a tile, [B, H, r, n], -inf where a key is hidden."""

    raw: Tensor
    z: Tensor  # after softcap and biases; the same tensor as ``raw`` where there are none
    visible: Tensor | None


def _tile(rows: _Rows, attention: Attention, keys: slice) -> _Tile:
    a = attention
    B, H, r, D = rows.q.shape
    heads = a.k.shape[1]
    k = a.k[:, :, keys].to(rows.q.dtype)
    raw = (rows.q.reshape(B, heads, H // heads * r, D) @ k.transpose(2, 3)).view(B, H, r, k.shape[2])
    bias = None if a.bias is None else rows.of(a.bias[..., keys])
    seen = _visible(rows, a, keys, bias)
    if seen is not None:
        raw.masked_fill_(~seen, -torch.inf)
    z = raw
    if a.softcap:
        z = (raw / a.softcap).tanh_().mul_(a.softcap)
    if bias is not None:
        z = z + bias.to(z.dtype)
    if a.alibi_slopes is not None:
        j = torch.arange(keys.start, keys.stop, device=z.device)
        distance = (rows.position[:, None, :, None] - j).abs().to(z.dtype)
        z = z - a.alibi_slopes.to(z.dtype)[:, None, None] * distance
    if seen is not None and z is not raw:
        z.masked_fill_(~seen, -torch.inf)
    return _Tile(raw, z, seen)


def _tile_sums(tile: _Tile) -> Sums:
    """The sums of a tile, whose logits are used up."""
    raw, z, seen = tile
    top = raw.amax(-1) if z is not raw else None
    if seen is None:
        count = torch.full_like(z[..., 0], z.shape[3])
        first = torch.zeros_like(z[..., :1], dtype=torch.int64)
    else:
        count = seen.sum(-1, dtype=z.dtype).expand(z.shape[:3])
        first = seen.to(torch.uint8).argmax(-1, keepdim=True).expand(*z.shape[:3], 1)
    z_first = z.gather(-1, first)[..., 0]
    z.scatter_(-1, first, -torch.inf)
    m = z.amax(-1)
    if top is None:
        top = torch.maximum(m, z_first)
    u = z.sub_(torch.where(m == -torch.inf, 0.0, m)[..., None])
    e = u.exp()
    s = e.sum(-1)
    t = u.clamp_(min=NO_PROBABILITY).mul_(e).sum(-1)
    return Sums(m, s, t, z_first, top, count)


def _tile_shape(q: Tensor, num_rows: int, Tk: int) -> tuple[int, int, int]:
    """How much of the batch, of the rows and of the keys a tile has."""
    B, H = q.shape[:2]
    r = max(1, min(_ROWS, num_rows))
    n = max(1, min(Tk, max(64, _TILE // max(1, H * r))))
    return max(1, min(B, _TILE // max(1, H * r * n))), r, n


def row_stats(q: Tensor, attention: Attention, rows: Tensor | None) -> RowStats:
    """Statistics of queries [B, H, Tq, D] at ``rows`` [B or 1, R], or of all."""
    num_rows = q.shape[2] if rows is None else rows.shape[1]
    out = RowStats.zeros(q, num_rows)
    b, r, n = _tile_shape(q, num_rows, attention.k.shape[2])
    for batch in ranges(0, q.shape[0], b):
        part = attention.of_batch(batch)
        part_rows = rows if rows is None or rows.shape[0] == 1 else rows[batch]
        for block in _row_blocks(q[batch], part_rows, part, r):
            tiles = [_tile_sums(_tile(block, part, keys)) for keys in ranges(*block.keys(part), n)]
            if tiles:
                stats = finish(Sums(*(torch.stack(values) for values in zip(*tiles, strict=True))), part.sinks)
                for whole, mine in zip(out, stats, strict=True):
                    whole[batch, :, block.block] = mine
    return out


def row_gradients(
    q: Tensor,
    attention: Attention,
    rows: Tensor | None,
    terms: RowTerms,
    d_rows: Tensor | None,
    d_k: Tensor | None,
) -> None:
    """Write the gradients of keys [B, H / G, Tk, D], and add those of rows [B, H, R, D] in the dtype of the sums."""
    num_rows = q.shape[2] if rows is None else rows.shape[1]
    Tk = attention.k.shape[2]
    b, r, n = _tile_shape(q, num_rows, Tk)
    for batch in ranges(0, q.shape[0], b):
        part = attention.of_batch(batch)
        part_rows = rows if rows is None or rows.shape[0] == 1 else rows[batch]
        blocks = _row_blocks(q[batch], part_rows, part, r)
        for keys in ranges(0, Tk, n):
            k = without_nan(part.k[:, :, keys].to(stats_dtype(q.dtype)))
            d_tile = torch.zeros_like(k)
            for block in blocks:
                start, stop = block.keys(part)
                if keys.stop <= start or keys.start >= stop:
                    continue
                mine = RowTerms(*(x[batch, :, block.block, None] for x in terms))
                da = _logit_gradient(_tile(block, part, keys), part, mine)
                by_key_head = da.view(*k.shape[:2], -1, k.shape[2])
                if d_rows is not None:
                    d_rows[batch, :, block.block] += (by_key_head @ k).view(block.q.shape) * part.scale
                if d_k is not None:
                    scaled = without_nan(block.q).reshape(*k.shape[:2], -1, k.shape[3])
                    d_tile += by_key_head.transpose(2, 3) @ scaled
            if d_k is not None:
                d_k[batch, :, keys] = d_tile.to(d_k.dtype)


def without_nan(x: Tensor) -> Tensor:
    """A NaN has already made its visible logits NaN; where it is hidden, its product with 0 must not count."""
    return x.nan_to_num(0, 0, 0)


def _logit_gradient(tile: _Tile, attention: Attention, row: RowTerms) -> Tensor:
    """Gradient with respect to raw logits, [B, H, r, n]."""
    # not z - lse: beside a large common offset, lse has lost the digits that log p_max kept
    logp = (tile.z - row.max_logit).add_(row.max_logprob)
    p = logp.exp()
    x = logp.clamp_(min=NO_PROBABILITY).add_(row.entropy)
    da = p.mul_(torch.sub(row.g_lse, x.mul_(row.g_entropy)))
    if attention.softcap:
        slope = 1 - (tile.raw / attention.softcap).tanh().square_()
        da.mul_(slope)
    if tile.visible is not None:
        da.masked_fill_(~tile.visible, 0)
    return da
