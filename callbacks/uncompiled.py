"""Runs compiled modules uncompiled for a while, so that hooks set after compiling are called."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule

__all__ = ["is_compiled", "uncompiled"]

# monitors open and close in any order, and set_stance restores what it found when it was made
_open = 0
_stance: Any = None


def is_compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether a module was compiled itself, by ``torch.compile(module)`` or ``module.compile()``."""
    return any(
        isinstance(module, OptimizedModule)
        or getattr(module, "_compiled_call_impl", None) is not None
        or getattr(module, "_compiler_ctx", None) is not None  # a LightningModule, unwrapped by the trainer
        for module in modules
    )


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run everything uncompiled until the last such context is closed, whatever the order."""
    global _open, _stance
    if not _open:
        _stance = torch.compiler.set_stance("force_eager")
    _open += 1
    try:
        yield
    finally:
        _open -= 1
        if not _open:
            _stance.__exit__(None, None, None)
