"""What responses and optimiser steps say about a policy's entropy: numbers from tensors, without a Trainer."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from litropy.callbacks.policy_readings import PolicySample, PolicyUpdate

__all__ = [
    "clip_shares",
    "covariance_quantiles",
    "entropy_change",
    "masked_quantiles",
    "phase_entropies",
    "quadrant_shares",
    "solution_counts",
    "thinking_end",
]

# shares of the tokens above, as in the paper's table
_TOP = {"top_0p2": 0.002, "top_2": 0.02, "top_20": 0.2, "median": 0.5}


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def masked_quantiles(values: Tensor, mask: Tensor, probabilities: Sequence[float]) -> list[Tensor]:
    """Quantiles of the values in ``mask``, each the nearest value; 0 without any. Nothing waits for the device.

    Example::

        >>> masked_quantiles(torch.tensor([5.0, 1.0, 3.0, 9.0]), torch.tensor([True, True, True, False]), [0.5, 1.0])
        [tensor(3.), tensor(5.)]
    """
    ordered = torch.where(mask, values, torch.inf).flatten().sort().values
    count = mask.sum()
    found = []
    for probability in probabilities:
        place = (probability * (count - 1).clamp(min=0)).round().long()
        found.append(torch.where(count > 0, ordered.gather(0, place[None])[0], 0))
    return found


def covariance_quantiles(update: PolicyUpdate) -> dict[str, Tensor]:
    r"""Mean and quantiles of :math:`(\ln \pi_t - \overline{\ln \pi})(A_t - \bar A)` over tokens.

    The mean is the covariance, which lowers the entropy to first order; ``top_2`` is what the top 2 % exceed.

    Reference: "The Entropy Mechanism of RL for Reasoning LLMs" (arXiv 2505.22617), equation 8 and table 1.
    """
    mask = update.mask
    product = (update.logprob - _mean(update.logprob, mask)) * (update.advantage - _mean(update.advantage, mask))
    quantiles = masked_quantiles(product, mask, [1 - share for share in _TOP.values()])
    return {"mean": _mean(product, mask)} | dict(zip(_TOP, quantiles, strict=True))


def quadrant_shares(update: PolicyUpdate) -> dict[str, Tensor]:
    r"""Shares of the tokens by the sign of their advantage and by whether they are likely: :math:`-\ln \pi_t < H_t`.

    ``likely_up`` and ``unlikely_down`` lower the entropy, ``unlikely_up`` and ``likely_down`` raise it. Tokens without
    an advantage are in none.
    """
    likely = -update.logprob < update.entropy
    up, down = update.advantage > 0, update.advantage < 0
    places = {"likely_up": likely & up, "unlikely_up": ~likely & up}
    places |= {"likely_down": likely & down, "unlikely_down": ~likely & down}
    return {name: _mean(place.float(), update.mask) for name, place in places.items()}


def clip_shares(update: PolicyUpdate) -> dict[str, Tensor]:
    """Shares of the tokens without a gradient because of the clip: above it (A > 0) and below it (A < 0)."""
    if update.clipped is None:
        return {}
    sides = {"high": update.advantage > 0, "low": update.advantage < 0}
    return {name: _mean((update.clipped & side).float(), update.mask) for name, side in sides.items()}


def entropy_change(updates: Sequence[PolicyUpdate]) -> Tensor:
    r"""First-order change of the mean entropy by the policy loss, a unit step of the logits [nats].

    .. math:: \frac1N \sum_t -w_t r_t A_t \Big( p_t (\ln p_t + H_t) - \sum_v p_v^2 (\ln p_v + H_t) \Big)

    for a softmax whose logits are free at each position, over the tokens that are not clipped. What a step of an
    optimiser on shared weights changes is proportional to it, more or less.

    Reference: after "Rethinking Entropy Interventions in RLVR" (arXiv 2510.10150), theorem 1, with all logits.
    """
    total = updates[0].logprob.new_zeros(())
    for update in updates:
        moving = update.mask if update.clipped is None else update.mask & ~update.clipped
        ratio = update.log_ratio.clamp(-20, 20).exp()
        assert update.slope is not None, "no callback asks for entropy_drift"
        step = update.weight * ratio * update.advantage * update.slope
        total = total + torch.where(moving, step, 0).sum() / update.mask.sum().clamp(min=1)
    return total


def thinking_end(responses: Tensor, mask: Tensor, marker: Sequence[int]) -> Tensor:
    """Place of the first token of ``marker`` in each response, int64 [R]; the response's length without it.

    Args:
        responses: tokens, int64 [R, T].
        mask: where they are tokens, bool [R, T].
        marker: tokens that end thinking.

    Example::

        >>> thinking_end(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[True, True, True, True]]), [7])
        tensor([2])
    """
    found = torch.zeros_like(mask)
    span = responses.shape[1] - len(marker) + 1
    if span > 0:
        windows = responses.unfold(1, len(marker), 1)
        whole = mask[:, len(marker) - 1 :]
        found[:, :span] = (windows == torch.tensor(marker, device=windows.device)).all(-1) & whole
    first = found.long().cumsum(-1).eq(0).sum(-1)
    return torch.minimum(first, mask.sum(-1))


def phase_entropies(responses: Tensor, mask: Tensor, entropy: Tensor, marker: Sequence[int]) -> dict[str, Tensor]:
    """Mean entropy of all tokens before the marker (thinking) and behind it (answer) [nats]; 0 without any."""
    end = thinking_end(responses, mask, marker)[:, None]
    place = torch.arange(mask.shape[1], device=mask.device)
    thinking, answer = mask & (place < end), mask & (place >= end + len(marker))
    return {"thinking": _mean(entropy, thinking), "answer": _mean(entropy, answer)}


def solution_counts(samples: Iterable[PolicySample]) -> tuple[float, float, int]:
    r"""Sums over prompts of the effective and of the plain number of distinct right answers, and how many prompts.

    The effective number is :math:`\exp(-\sum_i f_i \ln f_i)` with f the answers' shares among the right responses: as
    many as equally frequent answers would be. Prompts without a right response are left out.

    Example::

        >>> answers = ["1+6", "1+6", "2+5", "2+5"]
        >>> samples = [PolicySample("7=", a, 1.0, True, a, 0) for a in answers]
        >>> print("{:.1f} {:.0f} {}".format(*solution_counts(samples)))
        2.0 2 1
    """
    groups: dict[int, Counter[str | None]] = {}
    for sample in samples:
        if sample.correct:
            groups.setdefault(sample.group, Counter())[sample.answer] += 1
    effective = 0.0
    for counts in groups.values():
        shares = [count / counts.total() for count in counts.values()]
        effective += math.exp(-sum(share * math.log(share) for share in shares))
    return effective, float(sum(map(len, groups.values()))), len(groups)
