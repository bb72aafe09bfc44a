r"""Mean statistics of an output distribution, as sums over tokens that add up over micro-batches and ranks.

Shape key: N tokens of a batch, n sampled ones, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from litropy.losses import HeadStats

__all__ = ["OutputSums", "Sample", "choose_tokens", "exact_sums", "logit_statistics", "sampled_sums", "top_sums"]

# bytes of float32 logits that are worked on at a time
_BLOCK = 16 * 2**20


class Sample(NamedTuple):
    """Which tokens of a batch are looked at.

    Attributes:
        places: where they are in the flat batch, int64 [n].
        counts: 1 where the token counts, 0 where it is ignored, [n].
        share: how many tokens of the batch each of them stands for, a scalar.
    """

    places: Tensor
    counts: Tensor
    share: Tensor


class OutputSums(NamedTuple):
    """Sums over tokens, each a scalar on the device.

    A token of a sample counts as many as it stands for, except in ``excess`` and ``excess_variance``, which are
    those of the tokens themselves.

    Attributes:
        tokens: number of tokens.
        entropy: of entropies [nats].
        varentropy: of varentropies [nats^2].
        lse: of log-sum-exps.
        max_probability: of the likeliest entries' probabilities.
        top_entropy: of entropies of the k likeliest entries, renormalised [nats].
        top_entropy_raw: of the same, not renormalised [nats].
        top_mass: of the k likeliest entries' probabilities.
        targets: number of tokens with a target.
        cross_entropy: of -log p of the targets [nats].
        calibration_gap: of -log p - entropy [nats].
        excess: of the same, of the tokens that were looked at [nats].
        excess_variance: of varentropies of the same.
    """

    tokens: Tensor
    entropy: Tensor
    varentropy: Tensor
    lse: Tensor
    max_probability: Tensor
    top_entropy: Tensor
    top_entropy_raw: Tensor
    top_mass: Tensor
    targets: Tensor
    cross_entropy: Tensor
    calibration_gap: Tensor
    excess: Tensor
    excess_variance: Tensor

    @classmethod
    def of(cls, **sums: Tensor) -> "OutputSums":
        """The given sums, in float32, and 0 for all others."""
        zero = torch.zeros((), device=next(iter(sums.values())).device)
        return cls(**{name: sums[name].float() if name in sums else zero for name in cls._fields})

    def plus(self, other: "OutputSums") -> "OutputSums":
        """Sums over the tokens of both."""
        return OutputSums(*(a + b for a, b in zip(self, other, strict=True)))

    def means(self) -> dict[str, Tensor]:
        """Means over tokens, and of the last two over targets; NaN without any."""
        names = self._fields[self._fields.index("entropy") : self._fields.index("targets")]
        means = {name: getattr(self, name) / self.tokens for name in names}
        return means | {name: getattr(self, name) / self.targets for name in ("cross_entropy", "calibration_gap")}


def choose_tokens(num_tokens: int, valid: Tensor | None, most: int, generator: torch.Generator) -> Sample:
    """Choose random tokens without replacement, those that count first; nothing waits for the device.

    Args:
        num_tokens: N, at least 1.
        valid: which tokens count, bool [N]; None for all.
        most: how many to choose at most.
        generator: on the batch's device.

    Example::

        >>> sample = choose_tokens(6, torch.tensor([0, 1, 0, 1, 1, 0]).bool(), 4, torch.Generator().manual_seed(0))
        >>> sample.places[:3].sort().values, sample.counts, sample.share
        (tensor([1, 3, 4]), tensor([1., 1., 1., 0.]), tensor(1.))
    """
    device = generator.device
    order = torch.rand(num_tokens, generator=generator, device=device)
    if valid is None:
        index = order.topk(min(most, num_tokens)).indices
        counts = torch.ones(len(index), device=device)
        return Sample(index, counts, torch.full((), num_tokens / len(index), device=device))
    index = (order + valid).topk(min(most, num_tokens)).indices
    counts = valid[index].float()
    return Sample(index, counts, valid.sum() / counts.sum().clamp(min=1))


def logit_statistics(logits: Tensor, target: Tensor | None, top_k: int) -> HeadStats:
    r"""Statistics of rows of logits, a block at a time.

    With :math:`p = \mathrm{softmax}(z)`: the fields ``entropy``, ``varentropy``, ``lse``, ``max_logprob``,
    ``topk_entropy``, ``topk_mass`` and, with a target, ``logprob`` of ``HeadStats``.

    Args:
        logits: final logits z, [n, V]; -inf for what cannot be.
        target: token ids, int64 [n], negative where there is none.
        top_k: how many likeliest entries the top-k statistics take.

    Example::

        >>> stats = logit_statistics(torch.zeros(1, 4), torch.tensor([2]), top_k=2)
        >>> print(stats.entropy, stats.topk_entropy, stats.topk_mass, stats.logprob)
        tensor([1.3863]) tensor([0.6931]) tensor([0.5000]) tensor([-1.3863])
    """
    rows = max(1, _BLOCK // (4 * logits.shape[-1]))
    targets = [None] * len(logits) if target is None else target.split(rows)
    parts = [_block(part, y, top_k) for part, y in zip(logits.split(rows), targets, strict=False)]
    return HeadStats(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def _block(logits: Tensor, target: Tensor | None, top_k: int) -> dict[str, Tensor]:
    z = logits if logits.dtype == torch.float64 else logits.float()
    log_p = z.log_softmax(-1)
    top, first = log_p.topk(min(top_k, z.shape[-1]), -1)
    stats = {
        "lse": z.gather(-1, first[:, :1])[:, 0] - top[:, 0],
        "max_logprob": top[:, 0],
        "topk_entropy": torch.special.entr(top.softmax(-1)).sum(-1),
        "topk_mass": top.exp().sum(-1),
    }
    if target is not None:
        stats["logprob"] = log_p.gather(-1, target.clamp(min=0)[:, None])[:, 0]
    # in place from here on; p = 0 times a finite number where log p is -inf
    p = log_p.exp()
    log_p.clamp_(min=-1e4)
    stats["entropy"] = -(p * log_p).sum(-1)
    deviation = log_p.add_(stats["entropy"][:, None])
    stats["varentropy"] = p.mul_(deviation).mul_(deviation).sum(-1)
    return stats


def exact_sums(stats: HeadStats, valid: Tensor | None) -> OutputSums:
    """Sums over all tokens of a pass through the head, but for the top-k ones.

    Args:
        stats: entropy, varentropy, lse and max_logprob of each token, and logprob if there are targets.
        valid: which tokens have targets, bool, shaped like them; None if there are no targets.
    """
    assert stats.entropy is not None
    counts = torch.ones_like(stats.entropy) if valid is None else valid
    return _sums(stats, counts, torch.ones((), device=counts.device))


def top_sums(stats: HeadStats, sample: Sample) -> OutputSums:
    """The top-k sums, from a sample.

    Args:
        stats: topk_entropy and topk_mass of the sampled tokens, [n].
        sample: which tokens these are.
    """
    entropy, mass = stats.topk_entropy, stats.topk_mass
    assert entropy is not None
    assert mass is not None
    # - sum p log p over the k entries, with p = mass q
    raw = mass * entropy - torch.xlogy(mass, mass)
    return OutputSums.of(
        top_entropy=_total(entropy, sample.counts) * sample.share,
        top_entropy_raw=_total(raw, sample.counts) * sample.share,
        top_mass=_total(mass, sample.counts) * sample.share,
    )


def sampled_sums(stats: HeadStats, sample: Sample) -> OutputSums:
    """All sums, from a sample.

    Args:
        stats: of the sampled tokens, [n], as ``logit_statistics`` gives them.
        sample: which tokens these are.
    """
    return _sums(stats, sample.counts, sample.share).plus(top_sums(stats, sample))


def _sums(stats: HeadStats, counts: Tensor, share: Tensor) -> OutputSums:
    entropy, varentropy, lse, top = stats.entropy, stats.varentropy, stats.lse, stats.max_logprob
    assert entropy is not None
    assert varentropy is not None
    assert lse is not None
    assert top is not None
    tokens = counts.sum() * share
    sums = {
        "tokens": tokens,
        "entropy": _total(entropy, counts) * share,
        "varentropy": _total(varentropy, counts) * share,
        "lse": _total(lse, counts) * share,
        "max_probability": _total(top.exp(), counts) * share,
    }
    if stats.logprob is not None:
        excess = _total(-stats.logprob - entropy, counts)
        sums |= {
            "targets": tokens,
            "cross_entropy": _total(-stats.logprob, counts) * share,
            "calibration_gap": excess * share,
            "excess": excess,
            "excess_variance": _total(varentropy, counts),
        }
    return OutputSums.of(**sums)


def _total(values: Tensor, counts: Tensor) -> Tensor:
    """Sum over the tokens that count; others may be NaN."""
    return values.masked_fill(counts == 0, 0).sum()
