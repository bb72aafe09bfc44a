"""Which modules of a model are its layers, and what of their output is a token's representation."""

import re
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["find_layers", "hidden_states", "layer_suffix"]

# what torch.compile, FSDP and activation checkpointing put into names
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(\.|$)")


def find_layers(model: nn.Module, pattern: str | None = None) -> dict[int | str, nn.Module]:
    r"""Find the layers of a model.

    Args:
        model: any module.
        pattern: regular expression that a layer's whole dotted name must match, such as ``.*encoder\.layer\.\d+``; None
            takes the members of the ``nn.ModuleList`` that holds the most parameters: the decoder layers of a Hugging
            Face model.

    Returns:
        The layers, in the model's order, by their index if all of their names end with different indices, else by name.

    Raises:
        ValueError: if there are none, or the pattern is no regular expression.

    Example::

        >>> model = nn.ModuleDict({"h": nn.ModuleList([nn.Linear(2, 2), nn.ReLU()]), "norm": nn.LayerNorm(2)})
        >>> find_layers(model)
        {0: Linear(in_features=2, out_features=2, bias=True), 1: ReLU()}
        >>> list(find_layers(model, "norm|h.0"))
        ['h.0', 'norm']
    """
    if pattern is None:
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
        if not lists:
            raise ValueError(
                f"{type(model).__name__} has no nn.ModuleList, so its layers are unknown. Give `layers`, a regular"
                f" expression for their names; there are {_examples(model)}."
            )
        largest = max(lists, key=lambda module: sum(parameter.numel() for parameter in module.parameters()))
        return dict(enumerate(largest))
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"`layers` is {pattern!r}, which is no regular expression: {error}.") from error
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        name = _WRAPPERS.sub("", name).rstrip(".")
        if name not in found and compiled.fullmatch(name):  # of a wrapper and what it wraps, the wrapper
            found[name] = module
    if not found:
        raise ValueError(
            f"`layers` is {pattern!r}, which matches no module of {type(model).__name__}; there are {_examples(model)}."
        )
    indices = [name.rpartition(".")[2] for name in found]
    if all(index.isdecimal() for index in indices) and len(set(indices)) == len(indices):
        return {int(index): module for index, module in zip(indices, found.values(), strict=True)}
    return dict(found.items())


def _examples(model: nn.Module) -> str:
    names = [_WRAPPERS.sub("", name).rstrip(".") for name, _ in model.named_modules() if name]
    return ", ".join(dict.fromkeys(names[:: max(1, len(names) // 6)])) or "no submodules"


def layer_suffix(layer: int | str) -> str:
    """Return what stands for a layer in a metric's name.

    Example::

        >>> layer_suffix(3), layer_suffix("norm")
        ('layer_3', 'norm')
    """
    return f"layer_{layer}" if isinstance(layer, int) else layer


def hidden_states(output: Any, layer: int | str) -> Tensor:
    """Return the hidden states [..., D] in a layer's output: itself, or the first item of a tuple.

    Raises:
        ValueError: if there are none.
    """
    found = output[0] if isinstance(output, tuple | list) and output else output
    found = getattr(found, "last_hidden_state", found)
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim < 2:
        raise ValueError(
            f"Layer {layer} returns {type(output).__name__}; it must return hidden states [..., D], or a tuple that"
            " starts with them. Choose other modules by `layers`."
        )
    return found.to_local() if isinstance(found, DTensor) else found
