"""Explain in a few words why a checkpoint does not fit a model."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["explain_mismatch"]

_TELLING = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def explain_mismatch(
    model: Mapping[str, Tensor],
    checkpoint: Mapping[str, Tensor],
    model_config: Mapping[str, Any],
    checkpoint_config: Mapping[str, Any],
    shown: int = 3,
) -> str | None:
    """Compare names and shapes of two sets of parameters.

    Args:
        model: state dict of the model that is to be loaded.
        checkpoint: state dict of the checkpoint.
        model_config: the model's config as a dict.
        checkpoint_config: the config that the checkpoint was written with; empty if unknown.
        shown: how many parameters to name.

    Returns:
        A message, or None if they fit.
    """
    differences = []
    for name in {**model, **checkpoint}:
        here, there = model.get(name), checkpoint.get(name)
        if here is None:
            differences.append(f"{name} is in the checkpoint only")
        elif there is None:
            differences.append(f"{name} is in the model only")
        elif here.shape != there.shape:
            differences.append(f"{name} is {list(there.shape)} in the checkpoint, {list(here.shape)} in the model")
    if not differences:
        return None
    keys = [key for key in _TELLING if checkpoint_config and checkpoint_config.get(key) != model_config.get(key)]
    configs = "; ".join(f"{key} {checkpoint_config.get(key)} there, {model_config.get(key)} here" for key in keys)
    more = len(differences) - shown
    return (
        "The checkpoint belongs to another model"
        + (f" ({configs})" if configs else "")
        + f": {'; '.join(differences[:shown])}"
        + (f"; and {more} more" if more > 0 else "")
        + ". Resume with the config it was trained with, or start a new run."
    )
