"""The loss of a causal language model from its hidden states and its output head."""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict, Unpack

from torch import Tensor, nn

from litropy.losses import HeadStats, linear_cross_entropy
from litropy.losses.head_inputs import Impl
from litropy.losses.modes import Mode
from litropy.recipes.lora_head import active_head, low_rank_addition
from litropy.recipes.output_head import OutputHead

__all__ = ["HeadOperands", "LossOptions", "head_loss", "head_operands"]


class HeadOperands(NamedTuple):
    """What an output head multiplies hidden states with.

    Attributes:
        hidden: on the head's device, [..., D].
        weight: [V, D].
        bias: [V].
        low_rank: the pair of LoRA's factors, as the losses take it.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    low_rank: tuple[Tensor, Tensor] | None


def head_operands(head: nn.Module, info: OutputHead, hidden: Tensor) -> HeadOperands:
    """Take a head apart, with its adapters as they are now, and without its padding.

    Raises:
        ValueError: if an adapter of the head is not understood.
    """
    active = active_head(head)
    weight: Tensor = active.linear.weight
    bias: Tensor | None = active.linear.bias
    hidden = hidden.to(weight.device)
    low_rank, low_rank_bias = low_rank_addition(active, hidden)
    if low_rank_bias is not None:
        bias = low_rank_bias if bias is None else bias + low_rank_bias
    if info.num_logits < weight.shape[0]:  # the rest is padding
        weight = weight[: info.num_logits]
        bias = None if bias is None else bias[: info.num_logits]
        low_rank = None if low_rank is None else (low_rank[0], low_rank[1][: info.num_logits])
    return HeadOperands(hidden, weight, bias, low_rank)


class LossOptions(TypedDict, total=False):
    """Options of ``linear_cross_entropy`` that the head itself does not settle."""

    num_items: float | Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    skip_tol: float
    mode: Mode
    memory_budget_mib: float
    impl: Impl


def head_loss(
    head: nn.Module,
    info: OutputHead,
    hidden: Tensor,
    targets: Tensor,
    return_stats: Sequence[str] = (),
    **options: Unpack[LossOptions],
) -> tuple[Tensor, HeadStats | None]:
    """Cross-entropy of hidden states as the model itself computes it, but without logits.

    Args:
        head: the output head, with or without adapters.
        info: what the model does to its logits.
        hidden: what the model hands to its head, [B, T, D].
        targets: the token that each position has to predict, [B, T].
        return_stats: names of the ``HeadStats`` fields to return from the same pass, detached.
        **options: of ``linear_cross_entropy``.

    Returns:
        The loss, and the statistics if any were asked for.

    Raises:
        ValueError: if an adapter of the head is not understood.
    """
    hidden, weight, bias, low_rank = head_operands(head, info, hidden)
    result = linear_cross_entropy(
        hidden,
        weight,
        targets.to(hidden.device),
        linear_bias=bias,
        softcap=info.softcap,
        temperature=1 / info.scale,
        low_rank=low_rank,
        return_stats=tuple(return_stats),
        **options,
    )
    return result if isinstance(result, tuple) else (result, None)
