"""Row statistics of a linear head, from one pass over its never-stored logits."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from litropy.kernels.linear_head import Plan, linear_head_rows
from litropy.kernels.linear_head_types import RowStats, Want
from litropy.losses.head_inputs import Impl, LowRank, prepare, resolve_impl
from litropy.losses.head_passes import HeadPass, is_watched, show_pass, with_watched

__all__ = ["HeadStats", "check_stats", "linear_head_stats", "wanted"]

# workspace of the PyTorch implementation in bytes
_BUDGET = 64 * 2**20
_MAX_TOP_K = 64


@dataclass(frozen=True)
class HeadStats:
    """Statistics of every row, shaped like the target; a field that was not asked for is None.

    Attributes:
        logprob: log-probability of the target [nats].
        entropy: entropy of the softmax [nats], at least 0 up to rounding.
        lse: log-sum-exp of the logits.
        varentropy: variance of the surprisal, sum_v p_v (log p_v + entropy)^2 [nats^2].
        collision: sum_v p_v^2, the probability that two draws agree; -log of it is the Renyi-2 entropy.
        max_logprob: log-probability of the likeliest entry [nats].
        argmax: likeliest entry, int64; the lowest index among equals.
        nucleus_entropy: entropy of the nucleus, its probabilities scaled to sum to 1 [nats].
        entropy_drift: sum_v p_v^2 (log p_v + entropy), by how much the entropy falls to first order, for each unit by
            which the logits move along their own softmax.
        topk_entropy: entropy of the k likeliest entries, their probabilities scaled to sum to 1 [nats].
        topk_mass: probability of the k likeliest entries.
        rank: how many logits are strictly greater than the target's, int64.
        skipped_mass: share of the softmax mass that the backward pass leaves out.
        surviving_share: share of the tiles of the vocabulary that the backward pass computes.
    """

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    lse: Tensor | None = None
    varentropy: Tensor | None = None
    collision: Tensor | None = None
    max_logprob: Tensor | None = None
    argmax: Tensor | None = None
    nucleus_entropy: Tensor | None = None
    entropy_drift: Tensor | None = None
    topk_entropy: Tensor | None = None
    topk_mass: Tensor | None = None
    rank: Tensor | None = None
    skipped_mass: Tensor | None = None
    surviving_share: Tensor | None = None

    @staticmethod
    def of(rows: RowStats, names: Sequence[str], shape: torch.Size, detach: bool = False) -> "HeadStats":
        """Pick the named statistics of flat rows and give them ``shape``."""
        picked = {name: getattr(rows, name).view(shape) for name in names}
        return HeadStats(**{name: value.detach() if detach else value for name, value in picked.items()})


# spelled out once here: torch.compile cannot trace dataclasses.fields
_NAMES = tuple(field.name for field in fields(HeadStats))


def check_stats(names: Sequence[str]) -> None:
    """Raise ValueError if a name is not that of a ``HeadStats`` field."""
    for name in names:
        if name not in _NAMES:
            raise ValueError(f"{name!r} is no row statistic; there are {', '.join(_NAMES)}.")


def wanted(
    names: Sequence[str], mean_logprob: bool = False, top_k: int = 0, top_p: float = 0.0, open_nucleus: bool = False
) -> Want:
    """What the kernels have to compute for the named fields."""
    return Want(
        entropy="entropy" in names,
        mean_logprob=mean_logprob,
        argmax="argmax" in names,
        varentropy="varentropy" in names,
        collision="collision" in names,
        entropy_drift="entropy_drift" in names,
        rank="rank" in names,
        top_k=top_k if "topk_entropy" in names or "topk_mass" in names else 0,
        top_p=top_p if "nucleus_entropy" in names else 0.0,
        open_nucleus=open_nucleus and "nucleus_entropy" in names,
    )


def linear_head_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    stats: Sequence[str] = ("logprob", "entropy"),
    top_p: float | None = None,
    nucleus: Literal["closed", "open"] = "closed",
    top_k: int | None = None,
    low_rank: LowRank | None = None,
    vocab_parallel_group: dist.ProcessGroup | None = None,
    impl: Impl = "auto",
) -> HeadStats:
    """Statistics of ``softmax(input @ linear_weight.T + linear_bias)`` without its logits in memory.

    For one row h with target y::

        z = softcap tanh((W h + b) / softcap) / temperature
        lse = log sum_v exp z_v      logprob = z_y - lse      entropy = - sum_v p_v log p_v

    ``logprob``, ``entropy``, ``lse``, ``varentropy`` and ``nucleus_entropy`` are differentiable with respect to input,
    weight, bias and ``low_rank``. All come from one product with the weight.

    Args:
        input: hidden states, shape [..., D].
        linear_weight: head weight, shape [V, D]; hidden states are cast to its dtype. A DTensor that is cut by rows
            is a shard of the vocabulary.
        target: token ids, int64, shape [...]; negative ones are ignored: 0 in every field, no gradient. None computes
            every row.
        linear_bias: head bias, shape [V].
        softcap: bound of the logits (Gemma 2), a positive number.
        temperature: a positive number, or one a row, shape [...]; no gradient flows to it.
        stats: names of the fields to compute.
        top_p: mass of the nucleus, in (0, 1]: the smallest set of likeliest entries that reaches it, ties included.
        nucleus: ``"open"`` leaves the entry out that crosses ``top_p``; empty, its entropy is 0.
        top_k: how many likeliest entries ``topk_entropy`` and ``topk_mass`` take, 1 to 64.
        low_rank: a pair u [..., R] and B [V, R] that adds ``u B^T`` to the raw logits: a LoRA adapter of the head.
        vocab_parallel_group: ranks that hold one shard of weight and bias each; all have the same input and target.
        impl: ``"triton"``, ``"torch"``, or ``"auto"``: Triton on a GPU, PyTorch on a CPU.

    Returns:
        The statistics, float32 (float64 for float64 inputs), each shaped like ``target`` (or ``input.shape[:-1]``).

    Raises:
        ValueError: if shapes, dtypes or options do not fit, or, on a CPU, a target is outside the vocabulary. On a GPU
            that row is NaN.

    Example::

        >>> import torch
        >>> h, w = torch.zeros(2, 8), torch.randn(4, 8)
        >>> linear_head_stats(h, w, torch.tensor([0, 3])).entropy
        tensor([1.3863, 1.3863])
    """
    check_stats(stats)
    _check_options(stats, target, top_p, nucleus, top_k)
    rows = prepare(
        input,
        linear_weight,
        target,
        bias=linear_bias,
        softcap=softcap,
        temperature=temperature,
        low_rank=low_rank,
        group=vocab_parallel_group,
    )
    names = with_watched(stats, target is not None)
    want = wanted(names, False, top_k or 0, top_p or 0.0, nucleus == "open")
    plan = Plan(resolve_impl(impl, input.device, rows.dtype), rows.dtype, _BUDGET)
    result, _ = linear_head_rows(rows.input, rows.head, rows.target, want, plan, rows.shard, rows.main_grad)
    if is_watched(result.lse):
        found = HeadStats.of(result, names, input.shape[:-1], detach=True)
        head = (linear_weight, linear_bias, softcap, temperature, low_rank, vocab_parallel_group)
        show_pass(HeadPass(found, target, input, *head, impl))
    return HeadStats.of(result, stats, input.shape[:-1])


def _check_options(
    stats: Sequence[str], target: Tensor | None, top_p: float | None, nucleus: str, top_k: int | None
) -> None:
    for name in ("logprob", "rank"):
        if target is None and name in stats:
            raise ValueError(f"`stats` asks for {name}, which needs a `target`.")
    for name in ("skipped_mass", "surviving_share"):
        if name in stats:
            raise ValueError(f"`stats` asks for {name}: nothing is skipped here, only in `linear_cross_entropy`.")
    if "nucleus_entropy" in stats and top_p is None:
        raise ValueError("`stats` asks for nucleus_entropy, which needs `top_p`.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"`top_p` is {top_p}; it must be in (0, 1].")
    if nucleus not in ("closed", "open"):
        raise ValueError(f"`nucleus` is {nucleus!r}; choose 'closed' or 'open'.")
    if ("topk_entropy" in stats or "topk_mass" in stats) and top_k is None:
        raise ValueError("`stats` asks for topk_entropy or topk_mass, which need `top_k`.")
    if top_k is not None and not 1 <= top_k <= _MAX_TOP_K:
        raise ValueError(f"`top_k` is {top_k}; it must be in 1 to {_MAX_TOP_K}.")
