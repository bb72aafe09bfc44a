"""Statistics that compare the logits of a row with one another: rank of the target, top-k, and the nucleus of top-p.

They need whole rows of final logits, of a block of rows that fits the workspace. With shards of the vocabulary on
several ranks each sorts its own part; the threshold of the nucleus is then found by bisection over the numbers that a
float can be, which is as exact as sorting all of it.

Shape key: n rows of a block, V vocabulary of this shard.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from litropy.kernels.likeliest import greatest
from litropy.kernels.linear_head_types import RowStats, Want

__all__ = ["quick_nucleus", "rank_rows"]

_NUCLEUS = 16  # entries that are looked at first
_MORE = 8  # times as many are looked at where these do not do


def rank_rows(
    z: Tensor, target: Tensor | None, z_target: Tensor, stats: RowStats, want: Want, group: dist.ProcessGroup | None
) -> None:
    """Write ``rank``, ``topk_*`` and ``nucleus_*`` of a block of rows.

    Args:
        z: final logits of this shard, [n, V].
        target: token ids, [n]; None where the rank is not wanted.
        z_target: the target's logit, [n].
        stats: the rows' statistics over the whole vocabulary, which are added to.
        want: which are wanted.
        group: the ranks that hold the other shards.
    """
    if not z.shape[1]:  # an empty shard
        z = z.new_full((z.shape[0], 1), -math.inf)
    log_total = stats.lse[:, None]
    if want.rank:
        assert target is not None
        stats.rank = _all((z > z_target[:, None]).sum(1), dist.ReduceOp.SUM, group)
    if want.top_k:
        top = _top(z, want.top_k, group)
        log_p = top - log_total
        mass = log_p.exp().sum(1)
        q = top.softmax(1)
        stats.topk_mass = mass
        stats.topk_entropy = torch.special.entr(q).sum(1)
    if want.top_p:
        found = _nucleus(z, stats.lse, want, group)
        stats.nucleus_boundary, stats.nucleus_log_mass, stats.nucleus_entropy, _ = found


def quick_nucleus(z: Tensor, stats: RowStats, want: Want) -> None:
    """Write ``nucleus_*`` of a block of rows on a CPU, from the likeliest entries alone where it lies within them.

    A GPU sorts fast, and would have to be waited for to know which rows need it.
    """
    lse = stats.lse
    found = [torch.empty_like(lse) for _ in range(4)]
    rows, count = torch.arange(len(z)), _NUCLEUS
    while len(rows):
        top = greatest(z if len(rows) == len(z) else z[rows], count)
        part = _nucleus(top, lse[rows], want, None)
        for whole, mine in zip(found, part, strict=True):
            whole[rows] = mine
        rows = rows[(part[3] <= top[:, -1]) & (top.shape[1] < z.shape[1])]
        count *= _MORE
    stats.nucleus_boundary, stats.nucleus_log_mass, stats.nucleus_entropy, _ = found


def _nucleus(z: Tensor, lse: Tensor, want: Want, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Boundary, logarithm of the mass, entropy and least entry of the nucleus of each row of z, [n] each."""
    threshold = _threshold(z, lse, want.top_p, group)
    inside = z > threshold[:, None] if want.open_nucleus else z >= threshold[:, None]
    lowest = _all(z.masked_fill(~inside, math.inf).amin(1), dist.ReduceOp.MIN, group)
    next_one = _all(z.masked_fill(inside, -math.inf).amax(1), dist.ReduceOp.MAX, group)
    half_way = torch.where(next_one == -math.inf, next_one, next_one + (lowest - next_one) / 2)
    # two neighbouring floats have nothing between them; an empty nucleus has no lowest entry
    boundary = torch.where((half_way > next_one) | (next_one == -math.inf), half_way, lowest)
    log_p = z - lse[:, None]
    p = log_p.exp().masked_fill(~inside, 0)
    mass = _all(p.sum(1), dist.ReduceOp.SUM, group)
    moment = _all((p * log_p.clamp(min=-1e4)).sum(1), dist.ReduceOp.SUM, group)
    is_empty = (lowest == math.inf) & lse.isfinite()
    log_mass = mass.log().masked_fill(is_empty, 0)
    return [boundary, log_mass, (log_mass - moment / mass).masked_fill(is_empty, 0), threshold]


def _all(x: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(x, operation, group)
    return x


def _top(z: Tensor, k: int, group: dist.ProcessGroup | None) -> Tensor:
    """The k greatest logits of each row, [n, k]; fewer where there are not so many."""
    top = z.topk(min(k, z.shape[1]), 1).values
    if group is None:
        return top
    padded = top.new_full((z.shape[0], k), -math.inf)
    padded[:, : top.shape[1]] = top
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, padded, group)
    return torch.cat(parts, 1).topk(k, 1).values


def _threshold(z: Tensor, lse: Tensor, top_p: float, group: dist.ProcessGroup | None) -> Tensor:
    """The greatest logit such that it and all greater ones hold ``top_p`` of the mass, [n]; the least if none does."""
    ordered = z.sort(1, descending=True).values
    # in float64, or the order of a hundred thousand additions would show
    mass = (ordered - lse[:, None]).exp().cumsum(1, dtype=torch.float64)
    if group is None:
        crossing = (mass < top_p).sum(1, keepdim=True).clamp_max(z.shape[1] - 1)
        return ordered.gather(1, crossing)[:, 0]
    return _bisect(-ordered, mass, top_p, group)


def _bisect(negated: Tensor, mass: Tensor, top_p: float, group: dist.ProcessGroup) -> Tensor:
    """``_threshold`` over shards: ``negated`` logits in ascending order and the mass up to each, both [n, V]."""
    infinity = negated.new_full(negated.shape[:1], math.inf)
    low, high = _key_of(-infinity), _key_of(infinity)
    padded = torch.cat([mass.new_zeros(mass.shape[0], 1), mass], 1)
    for _ in range(8 * negated.element_size()):  # the key that is sought is at least low and below high
        middle = (low & high) + ((low ^ high) >> 1)
        count = torch.searchsorted(negated, -_float_of(middle)[:, None], right=True)
        reaches = _all(padded.gather(1, count)[:, 0], dist.ReduceOp.SUM, group) >= top_p
        low, high = torch.where(reaches, middle, low), torch.where(reaches, high, middle)
    return _float_of(low)


def _key_of(value: Tensor) -> Tensor:
    """The place of a float in the order of all floats: keys and floats grow together."""
    bits = value.view(torch.int32 if value.dtype == torch.float32 else torch.int64)
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def _float_of(key: Tensor) -> Tensor:
    """The inverse of ``_key_of``."""
    bits = torch.where(key < 0, key ^ torch.iinfo(key.dtype).max, key)
    return bits.view(torch.float32 if key.dtype == torch.int32 else torch.float64)
