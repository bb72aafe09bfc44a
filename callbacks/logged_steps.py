"""When a callback may read metrics without slowing training down."""

from lightning.pytorch import Trainer

__all__ = ["is_logged_step", "total_steps"]


def is_logged_step(trainer: Trainer) -> bool:
    """Whether the batch that ends now completes an optimiser step whose metrics Lightning logs.

    Logging waits for the device at these steps anyway, so a callback that reads a metric then costs nothing more.
    """
    return trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate()


def total_steps(trainer: Trainer) -> float:
    """Optimiser steps of the whole fit, infinite if neither ``max_steps`` nor the number of epochs is limited."""
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        return float("inf")
    return float(trainer.estimated_stepping_batches)
