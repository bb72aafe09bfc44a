"""The greatest entries of long rows, without sorting what is not among them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["keep_the_likeliest", "kth_greatest", "likeliest"]

_ENOUGH = 32  # entries that are looked at first
_MOST = torch.iinfo(torch.int32).max
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
    blocks = math.isqrt(k * V)  # as many as the entries of k blocks
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


def keep_the_likeliest(z: Tensor, behind: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Keep a first part of each row of z [n, V] in falling order, at least one entry, and put -inf for the others.

    Looks at 32 entries, and at more of the rows whose first part is longer; to know which, this waits for the device.

    Args:
        z: the rows.
        behind: says of the greatest entries [m, k] in falling order, of the rows with these numbers [m], which are
            behind the first part: false, then true.

    Example::

        >>> keep_the_likeliest(torch.tensor([[1.0, 3.0, 2.0]]), lambda top, rows: top < 1.5)
        tensor([[-inf, 3., 2.]])
    """
    values, places = likeliest(z, _ENOUGH)
    rows = torch.arange(len(z), device=z.device)
    is_behind = _but_the_first(behind(values, rows))
    kept = torch.full_like(z, -torch.inf).scatter_(1, places, values.masked_fill(is_behind, -torch.inf))
    while values.shape[1] < z.shape[1]:
        rows = rows[~is_behind[:, -1]]
        if not len(rows):
            break
        values, places = likeliest(z[rows], _MORE * values.shape[1])
        is_behind = _but_the_first(behind(values, rows))
        kept[rows] = kept[rows].scatter_(1, places, values.masked_fill(is_behind, -torch.inf))
    return kept


def _but_the_first(behind: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(behind[:, :1]), behind[:, 1:]], 1)


def kth_greatest(z: Tensor, k: Tensor) -> Tensor:
    """The k-th greatest entry of each row of z [n, V] in float32, by bisection over the floats; k [n] from 1 to V.

    Example::

        >>> kth_greatest(torch.tensor([[1.0, 3.0, -2.0], [0.0, 5.0, 5.0]]), torch.tensor([3, 2]))
        tensor([-2.,  5.])
    """
    bits = z.contiguous().view(torch.int32)
    keys = torch.where(bits < 0, bits ^ _MOST, bits)  # grow with the floats
    low, high = keys.amin(1), keys.amax(1)
    for _ in range(32):  # the key that is sought is at least low and at most high
        middle = (low | high) - ((low ^ high) >> 1)  # rounded up
        enough = (keys >= middle[:, None]).sum(1) >= k
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    return torch.where(low < 0, low ^ _MOST, low).view(torch.float32)
