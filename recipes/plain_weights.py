"""The weights of a model as a plain one has them: reparametrisations folded, LoRA adapters merged, ties kept."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from litropy.callbacks.sigma_reparam_weights import folded_state_dict
from litropy.recipes.output_head import inner_causal_lm

__all__ = ["plain_weights", "tie"]

_LORA = "peft.tuners.lora.layer.Linear"
_TRAINED_COPY = "peft.utils.other.ModulesToSaveWrapper"


def plain_weights(causal_lm: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""Turn the state of a model into that of a plain one: :math:`W + s B A` for every active LoRA adapter.

    PEFT is not imported; its layers are known by the names of their classes.

    Args:
        causal_lm: a model of transformers, or a ``PeftModel`` around one.
        state_dict: its parameters and buffers, full, that is gathered; empty on ranks that have nothing to write.

    Returns:
        Weights under the names of the model inside; sums are taken in float32 at least, and rounded once.

    Raises:
        ValueError: naming a layer with an adapter that is not plain LoRA, or a weight that is tied to another, but
            differs from it.
    """
    if not state_dict:
        return {}
    plain = folded_state_dict(state_dict)
    for path, module in causal_lm.named_modules():
        if _is(module, _LORA):
            _merge(f"{path}.", module, plain)
        elif _is(module, _TRAINED_COPY):
            _choose(f"{path}.", module, plain)
        elif hasattr(module, "base_layer"):
            raise ValueError(
                f"{path} is a {type(module).__module__}.{type(module).__name__}: only LoRA around linear layers is"
                " merged. Export what `merge_and_unload()` gives."
            )
    inner = inner_causal_lm(causal_lm)
    prefix = "" if inner is causal_lm else "base_model.model."
    return tie(inner, {name.removeprefix(prefix): value for name, value in plain.items()})


def tie(causal_lm: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Let weights that are tied share memory again, as gathered ones do not, so that they are stored once.

    Raises:
        ValueError: if they differ.
    """
    for copy, kept in (getattr(causal_lm, "all_tied_weights_keys", None) or {}).items():
        if copy not in weights or kept not in weights or weights[copy].data_ptr() == weights[kept].data_ptr():
            continue
        left, right = (weights[name].contiguous().view(-1).view(torch.uint8) for name in (copy, kept))
        if not torch.equal(left, right):
            raise ValueError(
                f"{copy} differs from {kept}, but the model's config ties them, and a folder holds them once. Leave"
                " both out of adapters, or train a model with `tie_word_embeddings: false`."
            )
        weights[copy] = weights[kept]
    return weights


def _is(module: nn.Module, path: str) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" == path for kind in type(module).__mro__)


def _merge(prefix: str, layer: Any, plain: dict[str, Tensor]) -> None:
    """Replace a layer's base and adapters by one weight."""
    base = _take(f"{prefix}base_layer.", plain)
    adapters = _take(f"{prefix}lora_", plain)
    names = [] if layer.disable_adapters or layer.merged else [n for n in layer.active_adapters if n in layer.lora_A]
    for name in names:
        if name in layer.lora_variant:
            raise ValueError(
                f"{prefix[:-1]}: the adapter {name!r} is a {type(layer.lora_variant[name]).__name__}, not plain LoRA."
                " Export what `merge_and_unload()` gives."
            )
        product = _wide(adapters[f"B.{name}.weight"]) @ _wide(adapters[f"A.{name}.weight"])
        change = (product.T if layer.fan_in_fan_out else product) * layer.scaling[name]
        base["weight"] = (_wide(base["weight"]) + change).to(base["weight"].dtype)
        if f"B.{name}.bias" in adapters:
            bias = _wide(base["bias"]) + _wide(adapters[f"B.{name}.bias"]) * layer.scaling[name]
            base["bias"] = bias.to(base["bias"].dtype)
    plain |= {prefix + name: value for name, value in base.items()}


def _choose(prefix: str, wrapper: Any, plain: dict[str, Tensor]) -> None:
    """Keep a layer's trained copy, or the original if that is what it computes with."""
    original, copies = _take(f"{prefix}original_module.", plain), _take(f"{prefix}modules_to_save.", plain)
    active = (
        []
        if wrapper.disable_adapters
        else [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    )
    chosen = _take(f"{active[0]}.", copies) if active else original
    plain |= {prefix + name: value for name, value in chosen.items()}


def _take(prefix: str, plain: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): plain.pop(name) for name in list(plain) if name.startswith(prefix)}


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
