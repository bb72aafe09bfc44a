"""Row statistics of a linear head, from one pass over its never-stored logits."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from litropy.kernels.linear_head import linear_head_rows
from litropy.kernels.linear_head_types import RowStats, Want
from litropy.losses.head_inputs import Impl, prepare, resolve_impl

__all__ = ["HeadStats", "check_stats", "linear_head_stats"]

# workspace of the PyTorch implementation in bytes
_BUDGET = 64 * 2**20


@dataclass(frozen=True)
class HeadStats:
    """Statistics of every row, shaped like the target; a field that was not asked for is None.

    Attributes:
        logprob: log-probability of the target [nats].
        entropy: entropy of the softmax [nats], at least 0 up to rounding.
        lse: log-sum-exp of the logits.
        argmax: likeliest entry, int64; the lowest index among equals.
    """

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    lse: Tensor | None = None
    argmax: Tensor | None = None

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


def linear_head_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    stats: Sequence[str] = ("logprob", "entropy"),
    impl: Impl = "auto",
) -> HeadStats:
    """Statistics of ``softmax(input @ linear_weight.T + linear_bias)`` without its logits in memory.

    For one row h with target y::

        z = softcap tanh((W h + b) / softcap) / temperature
        lse = log sum_v exp z_v      logprob = z_y - lse      entropy = - sum_v p_v log p_v

    All but ``argmax`` are differentiable with respect to input, weight and bias.

    Args:
        input: hidden states, shape [..., D].
        linear_weight: head weight, shape [V, D], in the dtype of ``input`` (or under autocast).
        target: token ids, int64, shape [...]; negative ones are ignored: 0 in every field, no gradient. None computes
            every row.
        linear_bias: head bias, shape [V].
        softcap: bound of the logits (Gemma 2), a positive number.
        temperature: a positive number, or one a row, shape [...]; no gradient flows to it.
        stats: names of the fields to compute.
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
    if target is None and "logprob" in stats:
        raise ValueError("`stats` asks for logprob, which needs a `target`.")
    rows = prepare(input, linear_weight, target, linear_bias, softcap, temperature)
    want = Want(entropy="entropy" in stats, argmax="argmax" in stats)
    result = linear_head_rows(rows.input, rows.head, rows.target, want, resolve_impl(impl, input), _BUDGET)
    return HeadStats.of(result, stats, input.shape[:-1])
