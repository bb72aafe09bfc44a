"""What an output head computes at the moment: ``h W^T + b``, plus ``u B^T`` if there are LoRA adapters around it.

PEFT is not imported; its layers are known by the names of their classes. What they compute depends on which adapters
are active, merged or disabled, so the question is asked anew in every step.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from litropy.recipes.head_tap import HeadTap

__all__ = ["ActiveHead", "active_head", "low_rank_addition"]

_LORA = "peft.tuners.lora.layer.Linear"
_TRAINED_COPY = "peft.utils.other.ModulesToSaveWrapper"
_ADVICE = (
    "A plain nn.Linear is supported, and LoRA or `modules_to_save` around one. Leave the head out of quantisation and"
    " of other adapters' `target_modules`, merge the adapter, or train with the model's own loss."
)


class Adapter(NamedTuple):
    """``scaling B A dropout(h)``, added to the logits."""

    A: nn.Linear
    B: nn.Linear
    dropout: nn.Module
    scaling: float


class ActiveHead(NamedTuple):
    """A linear layer, and the adapters that are added to it."""

    linear: nn.Linear
    adapters: tuple[Adapter, ...] = ()
    casts_input: bool = True


def active_head(head: Any, owner: str = "The model") -> ActiveHead:
    """Find what an output head computes with its adapters as they are now.

    Args:
        head: a plain ``nn.Linear``, or PEFT's ``lora.Linear`` or ``ModulesToSaveWrapper`` around one.
        owner: whose head it is, for the message.

    Raises:
        ValueError: naming the layer that is not understood.

    Example::

        >>> active_head(nn.Linear(2, 3)).linear
        Linear(in_features=2, out_features=3, bias=True)
    """
    if _is(head, _TRAINED_COPY):
        _own_forward(head, owner)
        return active_head(_trained_copy(head), owner)
    if not _is(head, _LORA):
        return ActiveHead(_plain(head, owner))
    _own_forward(head, owner)
    if head.disable_adapters and head.merged:
        head.unmerge()  # as its own forward does
    linear = _plain(head.base_layer, owner)
    if head.disable_adapters or head.merged:
        return ActiveHead(linear)
    names = [name for name in head.active_adapters if name in head.lora_A]
    for name in names:
        if name in head.lora_variant:
            raise ValueError(
                f"{owner} is not supported: the adapter {name!r} of its output head is a"
                f" {_name(type(head.lora_variant[name]))}, not plain LoRA. {_ADVICE}"
            )
    adapters = (
        Adapter(
            _plain(head.lora_A[name], owner),
            _plain(head.lora_B[name], owner),
            head.lora_dropout[name],
            head.scaling[name],
        )
        for name in names
    )
    return ActiveHead(linear, tuple(adapters), head.cast_input_dtype_enabled)


def low_rank_addition(head: ActiveHead, hidden: Tensor) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
    """The adapters' part of the logits, ``u B^T + c``, of several adapters side by side.

    Args:
        head: what the head computes.
        hidden: what the model hands to it, [..., D].

    Returns:
        The pair u [..., R] and B [V, R], and the bias c [V]; None where there is no such part.
    """
    inner, outer, biases = [], [], []
    for adapter in head.adapters:
        if head.casts_input:
            hidden = hidden.to(adapter.A.weight.dtype)
        inner.append(adapter.A(adapter.dropout(hidden)) * adapter.scaling)
        outer.append(adapter.B.weight)
        if adapter.B.bias is not None:
            biases.append(adapter.B.bias * adapter.scaling)
    if not inner:
        return None, None
    bias = torch.stack(biases).sum(0) if biases else None
    return (torch.cat(inner, -1), torch.cat(outer, -1)), bias


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is(module: Any, path: str) -> bool:
    """Whether a module is of a class, or of one made from it that computes the same (FSDP2 makes such)."""
    kind: Any = type(module)
    return any(_name(base) == path and kind.forward is base.forward for base in kind.__mro__)


def _trained_copy(wrapper: Any) -> Any:
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active or any(name not in wrapper.modules_to_save for name in active):
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]]


def _plain(layer: Any, owner: str) -> nn.Linear:
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        raise ValueError(
            f"{owner} is not supported: its output head is {_name(type(layer))}, not a plain nn.Linear. {_ADVICE}"
        )
    _own_forward(layer, owner)
    return layer


def _own_forward(layer: nn.Module, owner: str) -> None:
    """Refuse a ``forward`` that was replaced on the instance, but for hooks of accelerate, which move tensors."""
    replaced = vars(layer).get("forward")
    if replaced is not None and not isinstance(replaced, HeadTap) and not hasattr(layer, "_hf_hook"):
        raise ValueError(
            f"{owner} is not supported: something has replaced the `forward` of its output head {_name(type(layer))} by"
            f" {_name(type(replaced))}, so what it computes is unknown. Undo that, or train with the model's own loss."
        )
