"""Raw logits of a few chosen entries of the vocabulary for each row, without the others.

For a hidden state h [D] and chosen ids: ``a_k = w_{id_k} . h``. The weights of a block of rows are gathered at a time,
in the forward pass and again in the backward pass, so that nothing of the size N K D is ever stored.

Shape key: N rows, K chosen entries a row, D width, V vocabulary; n is the number of rows in a block.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from litropy.kernels.linear_head_operands import without_autocast
from litropy.kernels.linear_head_tiles import ranges

__all__ = ["selected_logits"]

# bytes of gathered weights
_GATHERED = 16 << 20


def _blocks(ids: Tensor, weight: Tensor) -> Any:
    return ranges(ids.shape[0], max(1, _GATHERED // max(1, ids.shape[1] * weight.shape[1] * 4)))


@custom_op("litropy::selected_logits", mutates_args=())
@without_autocast
def selected_logits(input: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """``input_n . weight[ids_nk]`` in float32 (float64 for a float64 weight), [N, K].

    Args:
        input: hidden states, [N, D], in the dtype of the weight.
        weight: head weight, [V, D].
        ids: entries of the vocabulary, [N, K] int64.

    Raises:
        ValueError: if an id is outside the vocabulary, on a CPU.
    """
    V = weight.shape[0]
    if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < V:
        raise ValueError(f"`ids` holds {int(ids.min())} to {int(ids.max())}; it must be within 0 to {V - 1}.")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    out = input.new_empty(ids.shape, dtype=dtype)
    for rows in _blocks(ids, weight):
        out[rows] = torch.bmm(weight[ids[rows]].to(dtype), input[rows, :, None].to(dtype))[:, :, 0]
    return out


@selected_logits.register_fake
def _(input: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return input.new_empty(ids.shape, dtype=torch.promote_types(weight.dtype, torch.float32))


@custom_op("litropy::selected_logits_backward", mutates_args=())
@without_autocast
def _backward(
    g: Tensor, input: Tensor, weight: Tensor, ids: Tensor, need_input: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    d_input = torch.empty_like(input) if need_input else input.new_empty(0)
    # float32, because a frequent entry is added to many times
    d_weight = torch.zeros_like(weight, dtype=g.dtype) if need_weight else weight.new_empty(0)
    for rows in _blocks(ids, weight):
        if need_input:
            d_input[rows] = torch.bmm(g[rows, None], weight[ids[rows]].to(g.dtype))[:, 0].to(input.dtype)
        if need_weight:
            parts = g[rows, :, None] * input[rows, None].to(g.dtype)
            # sorts on a GPU, where the order of plain additions would not be fixed
            d_weight.index_put_((ids[rows].flatten(),), parts.flatten(0, 1), accumulate=True)
    return d_input, d_weight.to(weight.dtype)


@_backward.register_fake
def _(
    g: Tensor, input: Tensor, weight: Tensor, ids: Tensor, need_input: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    d_input = torch.empty_like(input) if need_input else input.new_empty(0)
    return d_input, torch.empty_like(weight) if need_weight else weight.new_empty(0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    need_input, need_weight = ctx.needs_input_grad[:2]
    d_input, d_weight = _backward(g.contiguous(), *ctx.saved_tensors, need_input, need_weight)
    return d_input if need_input else None, d_weight if need_weight else None, None


selected_logits.register_autograd(_autograd, setup_context=_setup)
