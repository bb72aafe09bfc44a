"""The loss of a causal language model from its hidden states and its output head."""

from collections.abc import Sequence
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn

from litropy.losses import HeadStats, linear_cross_entropy
from litropy.losses.head_inputs import Impl
from litropy.recipes.output_head import OutputHead

__all__ = ["LossOptions", "head_loss"]


class LossOptions(TypedDict, total=False):
    """Options of ``linear_cross_entropy`` that the head itself does not settle."""

    num_items: float | Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    memory_budget_mib: float
    impl: Impl


def head_loss(
    head: nn.Linear,
    info: OutputHead,
    hidden: Tensor,
    targets: Tensor,
    return_stats: Sequence[str] = (),
    **options: Unpack[LossOptions],
) -> tuple[Tensor, HeadStats | None]:
    """Cross-entropy of hidden states as the model itself computes it, but without logits.

    Args:
        head: the output head.
        info: what the model does to its logits.
        hidden: what the model hands to its head, [B, T, D].
        targets: the token that each position has to predict, [B, T].
        return_stats: names of the ``HeadStats`` fields to return from the same pass, detached.
        **options: of ``linear_cross_entropy``.

    Returns:
        The loss, and the statistics if any were asked for.
    """
    weight, bias = head.weight[: info.num_logits], head.bias
    hidden = hidden.to(weight.device)
    if not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(weight.dtype)
    result = linear_cross_entropy(
        hidden,
        weight,
        targets.to(hidden.device),
        linear_bias=None if bias is None else bias[: info.num_logits],
        softcap=info.softcap,
        temperature=1 / info.scale,
        return_stats=tuple(return_stats),
        **options,
    )
    return result if isinstance(result, tuple) else (result, None)
