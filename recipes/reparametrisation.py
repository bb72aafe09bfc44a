"""Callbacks that change how a model computes its weights do so before it is compiled or sharded."""

from typing import Any, TypeVar

from torch import nn

from litropy.callbacks.sigma_reparam import SigmaReparam

__all__ = ["reparametrise"]

Model = TypeVar("Model", bound=nn.Module)


def reparametrise(model: Model, trainer: Any) -> Model:
    """Let the ``SigmaReparam`` callbacks of a trainer, if there is one, insert themselves; returns the model."""
    for callback in [] if trainer is None else trainer.callbacks:
        if isinstance(callback, SigmaReparam):
            callback.insert(model)
    return model
