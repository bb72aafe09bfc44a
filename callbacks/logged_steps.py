"""When a callback may read metrics without slowing training down."""

from lightning.pytorch import Trainer

__all__ = ["is_logged_step", "total_steps"]


def is_logged_step(trainer: Trainer) -> bool:
    """Whether the batch that ends now completes an optimiser step whose metrics Lightning logs.

    Logging waits for the device at these steps anyway, so a callback that reads a metric then costs nothing more.
    """
    done = trainer.fit_loop.batch_idx + 1
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    is_last = trainer.is_last_batch or done >= trainer.num_training_batches
    steps = done % trainer.accumulate_grad_batches == 0 or (
        is_last and not trainer.strategy.handles_gradient_accumulation
    )
    return steps and every > 0 and (trainer.global_step % every == 0 or trainer.should_stop)


def total_steps(trainer: Trainer) -> float:
    """Optimiser steps of the whole fit, infinite if neither ``max_steps`` nor the number of epochs is limited."""
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        return float("inf")
    return float(trainer.estimated_stepping_batches)
