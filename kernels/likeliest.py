"""The greatest entries of long rows, without sorting what is not among them."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["first_likeliest", "greatest", "kth_greatest", "likeliest"]

_ENOUGH = 48  # entries that are looked at first
_CACHED = 1 << 19  # entries of which a copy stays in the cache
_DEPTH = 8  # entries of a block from which on blocks are worth their while
_MORE = 8  # times as many are looked at where these do not do


def likeliest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest entries of each row of z [n, V] in falling order, and their places; all V if there are fewer.

    On a CPU ``topk`` moves every entry. Here only the maxima of blocks are compared: the k greatest entries lie in the
    k blocks with the greatest maxima. NumPy selects several times as fast as PyTorch.

    Example::

        >>> values, places = likeliest(torch.arange(1000.0).view(1, -1), 2)
        >>> values.tolist(), places.tolist()
        ([[999.0, 998.0]], [[999, 998]])
    """
    V = z.shape[1]
    k = min(k, V)
    if not _is_selected_by_numpy(z):
        found = z.topk(k, 1)
        return found.values, found.indices
    places = _candidates(z, k)
    places = _greatest(z, k) if places is None else places.gather(1, _greatest(z.gather(1, places), k))
    values = z.gather(1, places)
    order = torch.from_numpy(np.argsort(-values.detach().numpy(), 1))
    return values.gather(1, order), places.gather(1, order)


def _candidates(z: Tensor, k: int) -> Tensor | None:
    """Places [n, m] among which the k greatest entries of each row of z [n, V] are; None if all are."""
    V = z.shape[1]
    # about as many blocks as the entries of k blocks; a power of two divides most vocabularies
    depth = 1 << (max(1, V // k).bit_length() - 1) // 2
    if depth < _DEPTH:
        return None
    blocks = V // depth
    even = depth * blocks
    # block b holds the columns b, b + blocks, ..., so that the maxima are taken of whole vectors
    block = _greatest(z[:, :even].unflatten(1, (depth, blocks)).amax(1), k)
    places = (block[:, None] + torch.arange(0, even, blocks)[:, None]).flatten(1)
    return torch.cat([places, torch.arange(even, V).expand(len(z), -1)], 1) if even < V else places


def _is_selected_by_numpy(z: Tensor) -> bool:
    return z.device.type == "cpu" and z.dtype in (torch.float32, torch.float64)


def _greatest(z: Tensor, k: int) -> Tensor:
    """Places of the k greatest entries of each row of z [n, V], in no order."""
    first = z.shape[1] - k
    if not first:
        return torch.arange(k).expand(z.shape)
    return torch.from_numpy(np.argpartition(z.detach().numpy(), first, 1)[:, first:])


def first_likeliest(z: Tensor, behind: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A first part of each row of z [n, V] in falling order, at least one entry, and the places of what is in it.

    Looks at 48 entries, and at more of the rows whose first part is longer; to know which, this waits for the device.

    Args:
        z: the rows.
        behind: says of the greatest entries [m, k] in falling order, of the rows with these numbers [m], which are
            behind the first part: false, then true.

    Returns:
        Values [n, k], -inf behind the first part, and places [n, k]; k is as many as the longest first part needed.

    Example::

        >>> values, places = first_likeliest(torch.tensor([[1.0, 3.0, 2.0]]), lambda top, rows: top < 1.5)
        >>> values.tolist(), places.tolist()
        ([[3.0, 2.0, -inf]], [[1, 2, 0]])
    """

    def look(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, places = likeliest(z if len(rows) == len(z) else z[rows], k)
        is_behind = behind(values, rows)
        is_behind[:, 0] = False
        return values.masked_fill(is_behind, -torch.inf), places

    values, places = look(torch.arange(len(z), device=z.device), _ENOUGH)
    while values.shape[1] < z.shape[1]:
        rows = (values[:, -1] > -torch.inf).nonzero()[:, 0]
        if not len(rows):
            break
        more, their_places = look(rows, _MORE * values.shape[1])
        wider = (0, more.shape[1] - values.shape[1])
        values = torch.nn.functional.pad(values, wider, value=-torch.inf).index_copy(0, rows, more)
        places = torch.nn.functional.pad(places, wider).index_copy(0, rows, their_places)
    return values, places


def greatest(z: Tensor, k: int) -> Tensor:
    """``likeliest`` without the places, in less time.

    Example::

        >>> greatest(torch.tensor([[1.0, 3.0, 2.0]]), 2)
        tensor([[3., 2.]])
    """
    k = min(k, z.shape[1])
    if not _is_selected_by_numpy(z):
        return z.topk(k, 1).values
    places = _candidates(z, k) if z.numel() > _CACHED else None
    few = z if places is None else z.gather(1, places)
    first = few.shape[1] - k
    found = np.partition(few.detach().numpy(), first, 1)[:, first:] if first else few.detach().numpy().copy()
    found.sort(1)
    return torch.from_numpy(found).flip(1)


def kth_greatest(z: Tensor, k: Tensor, top: Tensor) -> Tensor:
    """The k-th greatest entry of each row of z [n, V], in float32 or float64; k [n] from 1 to V.

    Args:
        z: the rows.
        k: which entry.
        top: the greatest entries in falling order, as many as are known.

    Example::

        >>> z = torch.tensor([[1.0, 3.0, -2.0], [0.0, 5.0, 5.0]])
        >>> kth_greatest(z, torch.tensor([3, 2]), greatest(z, 1))
        tensor([-2.,  5.])
    """
    known = top.shape[1]
    if not _is_selected_by_numpy(z):
        near = top.gather(1, (k - 1).clamp(max=known - 1)[:, None])[:, 0]
        return near if known == z.shape[1] else torch.where(k <= known, near, _by_bisection(z, k))
    rows, before = z.detach().numpy(), (z.shape[1] - k).tolist()
    found = [
        best[place] if place < known else np.partition(row, first)[first] if first else row.min()
        for row, best, place, first in zip(rows, top.detach().numpy(), (k - 1).tolist(), before, strict=True)
    ]
    return z.new_tensor(found)


def _by_bisection(z: Tensor, k: Tensor) -> Tensor:
    """The k-th greatest entry of each row, where sorting would need several times the memory."""
    whole = torch.int32 if z.dtype == torch.float32 else torch.int64
    most = torch.iinfo(whole).max
    bits = z.contiguous().view(whole)
    keys = torch.where(bits < 0, bits ^ most, bits)  # grow with the floats
    low, high = keys.amin(1), keys.amax(1)
    for _ in range(8 * z.element_size()):  # the key that is sought is at least low and at most high
        middle = (low | high) - ((low ^ high) >> 1)  # rounded up
        enough = (keys >= middle[:, None]).sum(1) >= k
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    return torch.where(low < 0, low ^ most, low).view(z.dtype)
