"""The greatest entries of long rows, without sorting what is not among them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["behind_the_likeliest", "likeliest"]

_ENOUGH = 64


def likeliest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest entries of each row of z [n, V] in falling order, and their places; all V if there are fewer.

    On a CPU ``topk`` moves every entry. Here only the maxima of blocks are compared: the k greatest entries lie in the
    k blocks with the greatest maxima.

    Example::

        >>> values, places = likeliest(torch.arange(1000.0).view(1, -1), 2)
        >>> values.tolist(), places.tolist()
        ([[999.0, 998.0]], [[999, 998]])
    """
    V = z.shape[1]
    blocks = math.isqrt(k * V)
    if z.device.type != "cpu" or blocks <= k or 4 * blocks > V:
        found = z.topk(min(k, V), 1)
        return found.values, found.indices
    depth = V // blocks
    # block b holds the columns b, b + blocks, ..., so that the maxima are taken of whole vectors
    block = z[:, : depth * blocks].unflatten(1, (depth, blocks)).amax(1).topk(k, 1).indices
    places = (block[:, None] + blocks * torch.arange(depth)[:, None]).flatten(1)
    rest = torch.arange(depth * blocks, V).expand(len(z), -1)
    places = torch.cat([places, rest], 1)
    found = z.gather(1, places).topk(k, 1)
    return found.values, places.gather(1, found.indices)


def behind_the_likeliest(z: Tensor, behind: Callable[[Tensor, Tensor], Tensor], whole: Tensor | None = None) -> Tensor:
    """Which entries of each row of z [n, V] come behind a first part of the row in falling order, bool [n, V].

    Rows are sorted only if the first part is longer than 64 entries; to know which, this waits for the device.

    Args:
        z: the rows.
        behind: says of the greatest entries [m, k] in falling order, of the rows with these numbers [m], which are
            behind the first part: false, then true.
        whole: rows of which nothing is behind, bool [n].

    Example::

        >>> behind_the_likeliest(torch.tensor([[1.0, 3.0, 2.0]]), lambda top, rows: top < 2.5)
        tensor([[ True, False,  True]])
    """
    top, places = likeliest(z, _ENOUGH)
    rows = torch.arange(len(z), device=z.device)
    is_behind = behind(top, rows)
    found = torch.ones_like(z, dtype=torch.bool).scatter(1, places, is_behind)
    if whole is not None:
        found &= ~whole[:, None]
    unknown = ~is_behind[:, -1] if whole is None else ~(is_behind[:, -1] | whole)
    rows = unknown.nonzero()[:, 0]
    if top.shape[1] < z.shape[1] and len(rows):
        top, places = z[rows].sort(dim=1, descending=True, stable=True)
        found[rows] = torch.ones_like(top, dtype=torch.bool).scatter(1, places, behind(top, rows))
    return found
