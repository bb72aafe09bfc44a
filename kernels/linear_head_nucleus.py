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
    columns = block[:, None] + blocks * torch.arange(_DEPTH)
    place, depth = (z[row[:, None], columns] >= boundary[row]).nonzero(as_tuple=True)
    last_row, last = (z[:, _DEPTH * blocks :] >= boundary).nonzero(as_tuple=True)
    return Entries(torch.cat([row[place], last_row]), torch.cat([columns[place, depth], last + _DEPTH * blocks]))


def nucleus_factor(logp: Tensor, stats: RowStats, g: Tensor) -> Tensor:
    """What p is to be multiplied by inside of a nucleus, ``-g (log q + H) / A``, for ``log p`` [n, v] of rows [n]."""
    slope = (-g * (-stats.nucleus_log_mass).exp())[:, None]
    offset = (stats.nucleus_entropy - stats.nucleus_log_mass)[:, None]
    return torch.addcmul(offset * slope, logp, slope)


def nucleus_gradient(z: Tensor, logp: Tensor, p: Tensor, stats: RowStats, g: Tensor) -> tuple[Entries, Tensor] | None:
    """The entries of a tile [n, v] that have a gradient, and theirs [m]; None as ``nucleus_entries``."""
    entries = nucleus_entries(z, stats, g)
    if entries is None:
        return None
    rows = entries.rows
    return entries, nucleus_factor(logp[entries][:, None], stats.of_rows(rows), g[rows])[:, 0] * p[entries]
