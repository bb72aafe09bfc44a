"""The linear head's row statistics, written as one would on a whiteboard: logits stored, no blocks.

For one row with hidden state ``h`` [D] and target ``y``, over a vocabulary of V entries::

    a_v = w_v . h + b_v                        raw logits
    z_v = softcap tanh(a_v / softcap) / T      what the model's softmax sees
    lse = log sum_v exp z_v
    log p_v = z_v - lse
    H = - sum_v p_v log p_v                    entropy [nats]

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
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> dict[str, Tensor]:
    """Compute every row statistic from stored logits, differentiably.

    Args:
        input: hidden states, shape [N, D].
        weight: head weight, shape [V, D].
        bias: head bias, shape [V].
        target: token ids, shape [N]; negative rows are ignored (0 in every field).
        temperature: a number, or one value a row, shape [N].
        softcap: bound of the logits, ``softcap * tanh(z / softcap)``.

    Returns:
        ``logprob`` (only with a target), ``lse``, ``entropy``, ``mean_logprob`` (mean over the vocabulary) and
        ``argmax``, each of shape [N]; float64 for float64 inputs, else float32.
    """
    z = F.linear(input, weight, bias)
    if z.dtype != torch.float64:
        z = z.float()
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    logp = z.log_softmax(-1)
    stats = {
        "lse": z.logsumexp(-1),
        "entropy": -(logp.exp() * logp.clamp_min(torch.finfo(z.dtype).min)).sum(-1),
        "mean_logprob": logp.mean(-1),
        "argmax": z.argmax(-1),
    }
    if target is None:
        return stats
    stats["logprob"] = logp.gather(-1, target.clamp_min(0)[:, None])[:, 0]
    return {name: torch.where(target < 0, torch.zeros_like(value), value) for name, value in stats.items()}
