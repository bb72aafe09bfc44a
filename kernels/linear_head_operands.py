"""What the operators of the linear head share: checks, and the tuples that an operator's schema is made of.

Shape key: N rows, D width, V vocabulary.
"""

import torch
from torch import Tensor

from litropy.kernels.linear_head_types import RowStats

__all__ = ["Gradients", "Statistics", "check_target", "gradient_buffers", "stat_fields", "wanted_gradients"]

Statistics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


def check_target(target: Tensor | None, vocabulary: int) -> None:
    """Reject targets outside the vocabulary on a CPU; on a GPU, where looking would wait, such rows become NaN."""
    if target is not None and target.device.type == "cpu" and target.numel() and int(target.max()) >= vocabulary:
        raise ValueError(
            f"`target` holds {int(target.max())}, but the vocabulary has {vocabulary} entries (0 to {vocabulary - 1})."
            " Check that the tokenizer belongs to this model; mark tokens without a loss with `ignore_index`."
        )


def gradient_buffers(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    zero_weight: bool = True,
) -> Gradients:
    """Zeros in the shape of each gradient that is needed, and tensors of no elements for the others.

    ``zero_weight=False`` leaves the weight's gradient uninitialised.
    """

    def zeros(wanted: bool, like: Tensor | None) -> Tensor:
        if wanted and like is not None:
            return torch.zeros_like(like, memory_format=torch.contiguous_format)
        return input.new_zeros(0)

    if need_weight and not zero_weight:
        d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    else:
        d_weight = zeros(need_weight, weight)
    return zeros(need_input, input), d_weight, zeros(need_bias, bias)


def wanted_gradients(gradients: Gradients, *need: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients that are needed, None for the others, as autograd wants them."""
    input, weight, bias = (gradient if wanted else None for gradient, wanted in zip(gradients, need, strict=True))
    return input, weight, bias


def stat_fields(stats: RowStats) -> Statistics:
    """The statistics in the order of ``RowStats``, as an operator returns them."""
    return (
        stats.logprob,
        stats.lse,
        stats.max_logit,
        stats.max_logprob,
        stats.entropy,
        stats.mean_logprob,
        stats.argmax,
    )
