"""The gradient of a nucleus' entropy, which only the nucleus' own entries have.

    dz_v = -[v in nucleus] g q_v (log q_v + H)        q_v = p_v / A

Shape key: n rows and v columns of a tile; m entries of nuclei.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from litropy.kernels.linear_head_types import RowStats

__all__ = ["Entries", "nucleus_entries", "nucleus_factor", "nucleus_gradient"]

_DEPTH = 32  # entries of a block, of which the greatest is looked at first
_FEW = 1 / 16  # of a tile: up to this share of its entries is looked up one by one


class Entries(NamedTuple):
    """Where in a tile: rows and columns, [m] each."""

    rows: Tensor
    columns: Tensor


def nucleus_entries(z: Tensor, stats: RowStats, g: Tensor) -> Entries | None:
    """The entries of a tile that are in their rows' nuclei, of rows with a cotangent; None if they are many.

    None as well on a GPU, which would have to be waited for to know how many they are.

    Args:
        z: final logits [n, v].
        stats: of these rows.
        g: cotangent of the nucleus' entropy [n].
    """
    n, v = z.shape
    blocks = v // _DEPTH
    if z.device.type != "cpu" or not blocks:
        return None
    boundary = torch.where(g != 0, stats.nucleus_boundary, math.inf)[:, None]
    # block b holds the columns b, b + blocks, ..., so that the maxima are taken of whole vectors
    greatest = z[:, : _DEPTH * blocks].unflatten(1, (_DEPTH, blocks)).amax(1)
    row, block = (greatest >= boundary).nonzero(as_tuple=True)
    if len(row) * _DEPTH > _FEW * n * v:
        return None
    columns = block[:, None] + torch.arange(0, _DEPTH * blocks, blocks)
    place, depth = (z[row[:, None], columns] >= boundary[row]).nonzero(as_tuple=True)
    rows, columns = row[place], columns[place, depth]
    if _DEPTH * blocks < v:
        last_rows, last = (z[:, _DEPTH * blocks :] >= boundary).nonzero(as_tuple=True)
        rows, columns = torch.cat([rows, last_rows]), torch.cat([columns, last + _DEPTH * blocks])
    return Entries(rows, columns)


def nucleus_factor(logp: Tensor, stats: RowStats, g: Tensor, entries: Entries | None = None) -> Tensor:
    """What p is to be multiplied by inside of a nucleus, ``-g (log q + H) / A``, for ``log p`` of rows.

    Args:
        logp: of all entries [n, v], or of some [m].
        stats: of the rows [n].
        g: cotangent of the nucleus' entropy [n].
        entries: which these are; None for all.
    """
    slope = -g * (-stats.nucleus_log_mass).exp()
    offset = (stats.nucleus_entropy - stats.nucleus_log_mass) * slope
    if entries is None:
        return torch.addcmul(offset[:, None], logp, slope[:, None])
    return torch.addcmul(offset[entries.rows], logp, slope[entries.rows])


def nucleus_gradient(z: Tensor, logp: Tensor, p: Tensor, stats: RowStats, g: Tensor) -> tuple[Entries, Tensor] | None:
    """The entries of a tile [n, v] that have a gradient, and theirs [m]; None as ``nucleus_entries``."""
    entries = nucleus_entries(z, stats, g)
    if entries is None:
        return None
    return entries, nucleus_factor(logp[entries], stats, g, entries) * p[entries]
