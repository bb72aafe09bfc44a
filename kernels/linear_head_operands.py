"""What the operators of the linear head share: checks, schemas, and buffers for gradients.

Shape key: N rows, D width, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from litropy.kernels.linear_head_types import Gradients, Head, RowStats

__all__ = [
    "HEAD_SCHEMA",
    "STATS_SCHEMA",
    "check_target",
    "gradient_buffers",
    "returned",
    "wanted_gradients",
    "without_autocast",
]

# a schema is written out once and not inferred, so that operators can take and return the fields of a named tuple
HEAD_SCHEMA = (
    "Tensor weight, Tensor? bias, Tensor? low_rank, Tensor? mean_weight, Tensor? mean_total,"
    " Tensor? row_inv_temperature, float inv_temperature, float softcap"
)
STATS_SCHEMA = ", ".join(["Tensor"] * len(vars(RowStats())))


def without_autocast(operator: Callable[..., Any]) -> Callable[..., Any]:
    """An operator whose dtypes are its own: autocast reaches into it and would round float32 products."""

    @functools.wraps(operator)
    def run(*arguments: Any, **named: Any) -> Any:
        device = next(x for x in (*arguments, *named.values()) if isinstance(x, Tensor)).device.type
        with torch.autocast(device, enabled=False):
            return operator(*arguments, **named)

    return run


def check_target(target: Tensor | None, vocabulary: int) -> None:
    """Reject targets outside the vocabulary on a CPU; on a GPU, where looking would wait, such rows become NaN."""
    if target is not None and target.device.type == "cpu" and target.numel() and int(target.max()) >= vocabulary:
        raise ValueError(
            f"`target` holds {int(target.max())}, but the vocabulary has {vocabulary} entries (0 to {vocabulary - 1})."
            " Check that the tokenizer belongs to this model; mark tokens without a loss with `ignore_index`."
        )


def gradient_buffers(input: Tensor, head: Head, need: tuple[bool, ...], zero_weight: bool = True) -> Gradients:
    """Zeros in the shape and dtype of each gradient that is needed, None for the others.

    Args:
        input: hidden states, [N, D].
        head: the head in its own dtype.
        need: whether gradients of input, weight, bias and low-rank matrix are needed.
        zero_weight: whether the matrices' gradients are zeroed, or left uninitialised.
    """

    def buffer(wanted: bool, like: Tensor | None, zero: bool = True) -> Tensor | None:
        if not wanted or like is None:
            return None
        make = torch.zeros_like if zero else torch.empty_like
        return make(like, memory_format=torch.contiguous_format)

    need_input, need_weight, need_bias, need_low_rank = need
    return Gradients(
        buffer(need_input, input),
        buffer(need_weight, head.weight, zero_weight),
        buffer(need_bias, head.bias),
        buffer(need_low_rank, head.low_rank, zero_weight),
    )


def returned(gradients: Gradients, like: Tensor) -> tuple[Tensor, ...]:
    """Gradients as an operator returns them: tensors of no elements for those that nobody needs."""
    return tuple(like.new_zeros(0) if gradient is None else gradient for gradient in gradients)


def wanted_gradients(gradients: tuple[Tensor, ...], need: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients as autograd wants them: None for those that nobody needs."""
    return tuple(gradient if wanted else None for gradient, wanted in zip(gradients, need, strict=True))
