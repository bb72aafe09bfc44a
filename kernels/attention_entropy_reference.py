"""Attention entropy as one would write it on a whiteboard: all logits stored, no blocks.

For query i of a head, at position ``P_i = i + Tk - Tq`` (the last query stands at the last key), and key j::

    a_ij = scale q_i . k_j                                    raw logit
    z_ij = softcap tanh(a_ij / softcap) + bias_ij - slope |P_i - j|
    p_ij = exp(z_ij - lse_i)        lse_i = log sum_j exp z_ij, over visible keys and the sink logit s
    H_i  = - sum_j p_ij log p_ij - p_s log p_s                entropy [nats]

It is the truth of the tests in float64 and the eager twin in every other dtype.
"""

import math

import torch
from torch import Tensor

from litropy.kernels.attention_entropy_types import AttentionStats, hiding_bias, select_rows

__all__ = ["attention_entropy_reference", "visible"]


def visible(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    prefix_length: int | Tensor | None = None,
    segment_ids: Tensor | None = None,
    key_segment_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Which key each query sees, [B, H, Tq, Tk]; arguments as in ``attention_entropy``."""
    B, H, Tq, _ = q.shape
    Tk = k.shape[2]
    i = torch.arange(Tq, device=q.device)[:, None] + Tk - Tq
    j = torch.arange(Tk, device=q.device)
    near = torch.ones(B, H, Tq, Tk, dtype=torch.bool, device=q.device)
    if causal:
        near = near & (j <= i)
    if window is not None:
        near = near & ((i - j).abs() < window)
    if prefix_length is not None:
        prefix = torch.as_tensor(prefix_length, device=q.device).reshape(-1, 1, 1, 1)
        near = near | (j < prefix)
    if position_ids is not None:
        starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
        segment_ids = torch.cat([torch.zeros_like(position_ids[:, :1]), starts.cumsum(1)], 1)
    if segment_ids is not None:
        others = segment_ids if key_segment_ids is None else key_segment_ids
        near = near & (segment_ids[:, None, :, None] == others[:, None, None, :])
    if key_mask is not None:
        near = near & key_mask[:, None, None, :]
    if mask is not None:
        near = near & mask
    if bias is not None:
        near = near & ~(bias <= hiding_bias(bias.dtype))
    return near


def attention_entropy_reference(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    rows: Tensor | None = None,
    **visibility: object,
) -> AttentionStats:
    """Compute the statistics from stored logits, differentiably; arguments as in ``attention_entropy``."""
    H, Tq, D = q.shape[1:]
    Tk = k.shape[2]
    seen = visible(q, k, bias=bias, **visibility)  # type: ignore[arg-type]
    raw = q @ k.repeat_interleave(H // k.shape[1], 1).transpose(2, 3) * (D**-0.5 if scale is None else scale)
    if raw.dtype != torch.float64:
        raw = raw.float()
    z = softcap * torch.tanh(raw / softcap) if softcap else raw
    if bias is not None:
        z = z + bias.masked_fill(bias <= hiding_bias(bias.dtype), 0).to(z.dtype)
    if alibi_slopes is not None:
        distance = torch.arange(Tq, device=q.device)[:, None] + Tk - Tq - torch.arange(Tk, device=q.device)
        z = z - alibi_slopes.to(z.dtype)[:, None, None] * distance.abs()
    if rows is not None:
        rows = rows if rows.ndim == 2 else rows[None]
    raw, z, seen = (select_rows(x, rows) for x in (raw, z, seen))
    count = seen.sum(-1).to(z.dtype)
    some = count > 0
    zero = torch.zeros_like(count)

    def moments(columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of [B, H, R, n] logits, their entropy, and lse; rows of -inf only are as good as zeros."""
        columns = torch.where((columns == -math.inf).all(-1, keepdim=True), 0.0, columns)
        logp = columns.log_softmax(-1)
        entropy = -(logp.exp() * logp.masked_fill(logp == -math.inf, 0)).sum(-1)
        return logp, entropy, columns.logsumexp(-1)

    z = z.masked_fill(~seen, -math.inf)
    # one more outcome: the sink logit, or one of no probability
    outcome = torch.full_like(z[..., :1], -math.inf)
    if sinks is not None:
        outcome = sinks.to(z.dtype)[:, None, None].expand_as(outcome)
    logp, entropy, lse = moments(torch.cat([z, outcome], -1))
    p = logp.exp()
    is_first = seen & (seen.cumsum(-1) == 1)
    rest = count > 1
    _, entropy_rest, _ = moments(z.masked_fill(is_first, -math.inf))
    outcomes = count if sinks is None else count + 1
    share = entropy / torch.where(outcomes > 1, outcomes, 2.0).log()

    def amax(x: Tensor) -> Tensor:
        return x.amax(-1) if Tk else zero

    fields = {
        "entropy": entropy,
        "normalized_entropy": torch.where(outcomes > 1, share, torch.ones_like(share)),
        "lse": lse,
        "max_logit": amax(z),
        "max_raw_logit": amax(raw.masked_fill(~seen, -math.inf)),
        "p_max": amax(p[..., :-1]),
        "p_first": (p[..., :-1] * is_first).sum(-1),
        "p_sink": p[..., -1],
        "entropy_without_sinks": torch.where(rest, entropy_rest, zero),
    }
    broken = ~lse.isfinite()
    fields = {name: torch.where(broken, math.nan, value) for name, value in fields.items()}
    return AttentionStats(
        **{name: torch.where(some, value, zero) for name, value in fields.items()}, visible_keys=count
    )
