"""The linear head's row statistics, written as one would on a whiteboard: logits stored, no blocks.

For one row with hidden state ``h`` [D] and target ``y``, over a vocabulary of V entries::

    a_v = w_v . h + b_v (+ B_v . u)            raw logits
    z_v = softcap tanh(a_v / softcap) / T      what the model's softmax sees
    lse = log sum_v exp z_v                    log p_v = z_v - lse
    H   = - sum_v p_v log p_v                  entropy [nats]
    Vr  = sum_v p_v (log p_v + H)^2            varentropy
    S2  = sum_v p_v^2 (log p_v + H)            entropy drift
    H_S = - sum_{v in S} q_v log q_v           entropy of a set S, with q_v = p_v / sum_{v in S} p_v

It is the truth of the tests in float64 and the eager twin in every other dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["linear_head_reference"]


def linear_head_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    target: Tensor | None = None,
    *,
    low_rank: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mean_weight: Tensor | None = None,
    top_k: int = 1,
    top_p: float = 1.0,
    open_nucleus: bool = False,
) -> dict[str, Tensor]:
    """Compute every row statistic from stored logits, differentiably.

    Args:
        input: hidden states, shape [N, D].
        weight: head weight, shape [V, D].
        bias: head bias, shape [V].
        target: token ids, shape [N]; negative rows are ignored (0 in every field).
        low_rank: a pair u [N, R] and B [V, R] that adds ``u B^T`` to the raw logits.
        temperature: a number, or one value a row, shape [N].
        softcap: bound of the logits, ``softcap * tanh(z / softcap)``.
        mean_weight: share of each entry in ``mean_logprob``, shape [V]; 1 / V unless given.
        top_k: size of the set of ``topk_entropy`` and ``topk_mass``.
        top_p: mass of the nucleus, the smallest set of likeliest entries that reaches it, ties included.
        open_nucleus: leave the entry out that crosses ``top_p``, and its equals.

    Returns:
        The fields of ``RowStats`` that a user sees, each of shape [N] (``logprob`` and ``rank`` only with a target);
        float64 for float64 inputs, else float32.
    """
    z = F.linear(input, weight, bias)
    if low_rank is not None:
        z = z + F.linear(*low_rank)
    if z.dtype != torch.float64:
        z = z.float()
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    logp = z.log_softmax(-1)
    p = logp.exp()
    surprisal = -logp.masked_fill(p == 0, 0)  # 0 log 0 = 0
    entropy = (p * surprisal).sum(-1)
    surplus = entropy[:, None] - surprisal
    c = z.new_full((len(weight),), 1 / len(weight)) if mean_weight is None else mean_weight
    top = p.topk(min(top_k, z.shape[-1]), -1).values
    stats = {
        "lse": z.logsumexp(-1),
        "max_logprob": logp.amax(-1),
        "argmax": z.argmax(-1),
        "entropy": entropy,
        "varentropy": (p * surplus.square()).sum(-1),
        "collision": p.square().sum(-1),
        "entropy_drift": (p.square() * surplus).sum(-1),
        "mean_logprob": (c * logp.masked_fill(c == 0, 0)).sum(-1),
        "topk_entropy": _entropy(top),
        "topk_mass": top.sum(-1),
        "nucleus_entropy": _entropy(p.masked_fill(~_nucleus(z, top_p, open_nucleus), 0)),
    }
    if target is None:
        return stats
    picked = target.clamp_min(0)[:, None]
    stats["logprob"] = logp.gather(-1, picked)[:, 0]
    stats["rank"] = (z > z.gather(-1, picked)).sum(-1)
    return {name: torch.where(target < 0, torch.zeros_like(value), value) for name, value in stats.items()}


def _entropy(p: Tensor) -> Tensor:
    """Entropy of each row of probabilities, scaled to sum to 1; 0 of a row without any."""
    total = p.sum(-1, keepdim=True)
    q = p / total.masked_fill(total == 0, 1)
    return -(q * q.masked_fill(q == 0, 1).log()).sum(-1)


def _nucleus(z: Tensor, top_p: float, is_open: bool) -> Tensor:
    """Which entries are in the nucleus, [N, V] bool."""
    ordered = z.detach().sort(-1, descending=True).values
    mass = ordered.softmax(-1).cumsum(-1, dtype=torch.float64)
    crossing = (mass < top_p).sum(-1, keepdim=True).clamp_max(z.shape[-1] - 1)
    threshold = ordered.gather(-1, crossing)
    return z > threshold if is_open else z >= threshold
