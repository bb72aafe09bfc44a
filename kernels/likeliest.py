"""The greatest entries of long rows, without sorting what is not among them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["keep_the_likeliest", "likeliest"]

_ENOUGH = 64  # entries that are looked at first
_MORE = 8  # times as many are looked at where these do not do


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


def keep_the_likeliest(
    z: Tensor,
    behind: Callable[[Tensor, Tensor], Tensor],
    whole: Tensor | None = None,
    top: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Keep a first part of each row of z [n, V] in falling order, at least one entry, and put -inf for the others.

    Looks at 64 entries, and at more of the rows whose first part is longer; to know which, this waits for the device.

    Args:
        z: the rows.
        behind: says of the greatest entries [m, k] in falling order, of the rows with these numbers [m], which are
            behind the first part: false, then true.
        whole: rows that are kept as they are, bool [n].
        top: what ``likeliest`` has found already.

    Example::

        >>> keep_the_likeliest(torch.tensor([[1.0, 3.0, 2.0]]), lambda top, rows: top < 1.5)
        tensor([[-inf, 3., 2.]])
    """
    values, places = likeliest(z, _ENOUGH) if top is None else top
    rows = torch.arange(len(z), device=z.device)
    is_behind = _but_the_first(behind(values, rows))
    kept = torch.full_like(z, -torch.inf).scatter_(1, places, values.masked_fill(is_behind, -torch.inf))
    while values.shape[1] < z.shape[1]:
        unknown = ~is_behind[:, -1]
        rows = rows[unknown if whole is None else unknown & ~whole[rows]]
        if not len(rows):
            break
        values, places = likeliest(z[rows], _MORE * values.shape[1])
        is_behind = _but_the_first(behind(values, rows))
        kept[rows] = kept[rows].scatter_(1, places, values.masked_fill(is_behind, -torch.inf))
    return kept if whole is None else torch.where(whole[:, None], z, kept)


def _but_the_first(behind: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(behind[:, :1]), behind[:, 1:]], 1)
