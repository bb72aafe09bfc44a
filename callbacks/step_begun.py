"""Whether a module's training step runs, or what it does before that."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

__all__ = ["step_begun"]


def step_begun(trainer: Trainer) -> Callable[[], bool]:
    """Return a function that says whether the step of the present batch has begun.

    Call this in ``on_train_batch_start``. Callbacks have that hook before the module has its own, in which it may try
    its model out on the batch; the answer turns to yes after both.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    before = progress.started
    return lambda: progress.started > before
