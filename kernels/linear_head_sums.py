"""Streaming sums of rows of logits: what a tile adds, how parts of the vocabulary merge, what the sums mean.

Centred at the running maximum m, with u = z - m::

    s = sum exp u    t = sum u exp u    b = sum exp 2u    bt = sum u exp 2u    r = sum c u
    t2 = sum (u - t / s)^2 exp u

Two sets of sums merge by moving both to the greater maximum and adding, in any order: a tile at a time, shares of the
vocabulary of one GPU, or shards on several ranks. t2 is central, since a difference of raw moments would lose digits:
with the means of the parts it gains ``sum_i s_i (t_i / s_i - t / s)^2``. README.md in this folder has the derivation.

Shape key: n rows, S parts of the vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from litropy.kernels.linear_head_types import RowStats, Want

__all__ = ["Sums", "finish_sums", "merge_sums", "reduce_sums"]


@dataclass
class Sums:
    """Sums of n rows, each [n] (or [S, n] before S parts are merged); what nobody asked for is [0]."""

    m: Tensor
    s: Tensor
    t: Tensor
    t2: Tensor
    b: Tensor
    bt: Tensor
    r: Tensor
    z_target: Tensor
    found: Tensor  # 1 where this part of the vocabulary holds the target
    argmax: Tensor  # int64

    @staticmethod
    def start(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype, has_target: bool, want: Want) -> "Sums":
        """The sums of no logits at all."""

        def zeros(present: bool, dtype: torch.dtype = dtype) -> Tensor:
            return like.new_zeros(shape if present else (0,), dtype=dtype)

        return Sums(
            m=like.new_full(shape, -math.inf, dtype=dtype),
            s=zeros(True),
            t=zeros(want.first_moment),
            t2=zeros(want.varentropy),
            b=zeros(want.collision or want.entropy_drift),
            bt=zeros(want.entropy_drift),
            r=zeros(want.mean_logprob),
            z_target=zeros(has_target),
            found=zeros(has_target),
            argmax=zeros(want.argmax, torch.int64),
        )

    def move(self, rows: Tensor | slice, m: Tensor, seen: float | Tensor) -> Tensor:
        """Centre some rows at ``m``, at least as great as before; ``seen`` is the sum of c so far. Returns the centre.

        Rows that have seen only -inf are centred at 0: their sums stay 0 instead of NaN.
        """
        m_old, s = self.m[rows], self.s[rows]
        centre = m.masked_fill(m == -math.inf, 0.0)
        d = (m_old - centre).masked_fill(m_old == -math.inf, 0.0)
        decay = d.exp()
        if self.t2.numel():
            self.t2[rows] = decay * self.t2[rows]
        if self.t.numel():
            self.t[rows] = decay * (self.t[rows] + d * s)
        if self.bt.numel():
            self.bt[rows] = decay * decay * (self.bt[rows] + d * self.b[rows])
        if self.b.numel():
            self.b[rows] = decay * decay * self.b[rows]
        if self.r.numel():
            self.r[rows] += seen * d
        self.s[rows] = decay * s
        self.m[rows] = m
        return centre

    def mean(self) -> Tensor:
        """Mean of u under the softmax, 0 where there is no mass."""
        return (self.t / self.s).masked_fill(self.s == 0, 0.0)

    def additive(self) -> list[Tensor]:
        """The fields that add up once they share a centre."""
        fields = (self.s, self.t, self.b, self.bt, self.r, self.z_target, self.found)
        return [x for x in fields if x.numel()]


def merge_sums(parts: Sums, seen: Tensor) -> Sums:
    """Merge the sums of S parts of the vocabulary, each [S, n], in the order of their columns.

    Args:
        parts: the sums.
        seen: sum of the mean's weights c in each part, [S, 1].
    """
    if parts.argmax.numel():
        # the first of the greatest parts, so that a tie keeps the lower index
        parts.argmax = parts.argmax.gather(0, parts.m.argmax(0, keepdim=True))[0]
    parts.move(slice(None), parts.m.amax(0).expand_as(parts.m), seen)
    summed = {name: x.sum(0) for name, x in vars(parts).items() if x.ndim > 1}
    merged = Sums(**(vars(parts) | summed | {"m": parts.m[0]}))
    if merged.t2.numel():
        merged.t2 += (parts.s * (parts.mean() - merged.mean()).square()).sum(0)
    return merged


def reduce_sums(sums: Sums, group: dist.ProcessGroup, seen: float | Tensor, offset: Tensor) -> None:
    """Merge the sums of every rank's shard of the vocabulary: one max and one sum over the group.

    Args:
        sums: this shard's, [n]; on return those of the whole vocabulary.
        group: the ranks that hold the shards.
        seen: sum of the mean's weights c in this shard.
        offset: id of this shard's first entry; the argmax becomes a global id, at the cost of one more reduction.
    """
    if not len(sums.m):  # on all ranks alike
        return
    m = sums.m.clone()
    dist.all_reduce(m, dist.ReduceOp.MAX, group)
    if sums.argmax.numel():
        nowhere = torch.iinfo(torch.int64).max
        first = torch.where(sums.m == m, sums.argmax + offset, nowhere)
        dist.all_reduce(first, dist.ReduceOp.MIN, group)
        sums.argmax = first.masked_fill(first == nowhere, 0)  # a row of NaN
    sums.move(slice(None), m, seen)
    fields = sums.additive()
    total = torch.stack(fields)
    if sums.t2.numel():  # as a raw moment it adds up too, and float64 has the digits for it
        raw = sums.t2.double() + sums.s.double() * sums.mean().double().square()
        total = torch.cat([total.double(), raw[None]])
    dist.all_reduce(total, dist.ReduceOp.SUM, group)
    for mine, whole in zip(fields, total, strict=False):
        mine.copy_(whole)
    if sums.t2.numel():
        sums.t2.copy_((total[-1] - total[1].square() / total[0]).clamp_min(0))


def finish_sums(sums: Sums, target: Tensor | None, mean_total: float | Tensor, want: Want) -> RowStats:
    """Turn the sums of the whole vocabulary into statistics; ignored rows get 0, a target that no part has NaN."""
    log_s = sums.s.log()
    empty = log_s[:0]
    mean_u = sums.t / sums.s if want.first_moment else empty
    entropy = log_s - mean_u if want.first_moment else empty
    stats = RowStats(
        logprob=empty,
        lse=sums.m + log_s,
        max_logit=sums.m,
        max_logprob=-log_s,
        entropy=entropy if want.entropy or want.varentropy else empty,
        mean_logprob=sums.r - mean_total * log_s if want.mean_logprob else empty,
        varentropy=sums.t2 / sums.s if want.varentropy else empty,
        collision=sums.b / sums.s.square() if want.collision else empty,
        entropy_drift=(sums.bt - mean_u * sums.b) / sums.s.square() if want.entropy_drift else empty,
        argmax=sums.argmax,
    )
    if target is not None:
        stats.logprob = (sums.z_target - sums.m - log_s).masked_fill(sums.found == 0, math.nan)
        stats.zero_where(target < 0)
    return stats
