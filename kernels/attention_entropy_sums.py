"""Sums over shares of the keys, centred at each share's greatest logit, and the statistics they make.

For the logits z of one row in one share of the keys, its first visible key set aside, with u = z - m::

    m = max z      s = sum exp u      t = sum u exp u

Shares are merged by shifting them to the greatest centre, with d = m - m' <= 0::

    t' = sum e^d (t + d s)      s' = sum e^d s      H = log s' - t' / s'      lse = m' + log s'

No term of the entropy is negative, so nothing cancels. The row's first key and the sink logit join one at a time, which
gives the statistics without and with them.

Shape key: S shares, in the order of keys; rows [...].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from litropy.kernels.attention_entropy_types import RowStats

__all__ = ["NO_PROBABILITY", "Sums", "finish"]

# exp of this is 0 in every dtype; in place of -inf, whose product with that 0 would be NaN
NO_PROBABILITY = -1e4


class Sums(NamedTuple):
    """What a share of the keys comes to, each [S, ...]."""

    m: Tensor  # greatest logit of visible keys but the share's first; -inf if there is none
    s: Tensor
    t: Tensor
    z_first: Tensor  # logit of the share's first visible key; anything if there is none
    max_raw: Tensor  # greatest logit before softcap and biases
    num_keys: Tensor  # how many keys are visible


class _Outcomes(NamedTuple):
    """Merged sums of a row, centred where its greatest logit is."""

    m: Tensor
    s: Tensor
    t: Tensor

    @property
    def centre(self) -> Tensor:
        return _finite(self.m)

    def merge(self, z: Tensor) -> "_Outcomes":
        """Add one outcome of logit z to each row."""
        m = torch.maximum(self.m, z)
        shift, u = _shift(self.m, _finite(m)), z - _finite(m)
        decay, e = shift.exp(), u.exp()
        t = decay * (self.t + shift * self.s) + u.clamp_min(NO_PROBABILITY) * e
        return _Outcomes(m, decay * self.s + e, t)

    def entropy(self) -> Tensor:
        return self.s.log() - self.t / self.s


def _finite(m: Tensor) -> Tensor:
    """A centre that can be subtracted: 0 for rows that have no outcome yet."""
    return torch.where(m == -torch.inf, 0.0, m)


def _shift(m: Tensor, centre: Tensor) -> Tensor:
    return torch.where(m == -torch.inf, 0.0, m - centre)


def finish(sums: Sums, sinks: Tensor | None) -> RowStats:
    """Merge the shares of rows [S, B, H, R] and turn them into statistics; ``sinks`` [H] are one more outcome a row."""
    live = sums.num_keys > 0
    count = sums.num_keys.sum(0)
    # the first key of a row's first live share is the row's; those of later shares are keys like any other
    firsts = torch.where(live & (live.cumsum(0) == 1), sums.z_first, -torch.inf)
    others = torch.where(live & (live.cumsum(0) > 1), sums.z_first, -torch.inf)
    z_first = firsts.amax(0)
    m = torch.maximum(sums.m, others).amax(0)
    shift, u = _shift(sums.m, _finite(m)), others - _finite(m)
    decay, e = shift.exp(), u.exp()
    t = decay * (sums.t + shift * sums.s) + u.clamp_min(NO_PROBABILITY) * e
    rest = _Outcomes(m, (decay * sums.s + e).sum(0), t.sum(0))
    entropy_rest = torch.where(count > 1, rest.entropy(), 0.0)
    keys = rest.merge(z_first)
    sink = torch.full_like(z_first, -torch.inf) if sinks is None else sinks.to(m.dtype)[:, None].expand_as(m)
    outcomes = keys.merge(sink)
    lse = outcomes.centre + outcomes.s.log()

    def probability(z: Tensor) -> Tensor:
        return (z - outcomes.centre).exp() / outcomes.s

    stats = RowStats(
        outcomes.entropy(),
        lse,
        keys.m,
        sums.max_raw.amax(0),
        probability(keys.m),
        probability(z_first),
        probability(sink),
        entropy_rest,
        count,
    )
    broken = ~lse.isfinite()
    stats = RowStats(*(torch.where(broken, torch.nan, x) for x in stats))._replace(visible_keys=count)
    return RowStats(*(torch.where(count > 0, x, 0.0) for x in stats))
