"""Tokens a second and peak memory."""

import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from litropy.callbacks.logged_steps import is_logged_step

__all__ = ["Throughput", "peak_memory_mib"]


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory of a device in MiB: what CUDA's allocator gave out, or the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Throughput(Callback):
    """Measure speed and memory, without waiting for the device.

    Logs ``train/tokens_per_second`` (input tokens of all ranks, padding included, without the time of validation) and
    ``train/peak_memory_mib`` (of this rank's GPU; without one, the process's resident memory), at the steps that are
    logged anyway (``log_every_n_steps``). Tokens are counted by ``pl_module.num_tokens_in_batch(batch)`` where there is
    one, else by the size of ``batch["input_ids"]``.

    Example::

        trainer = Trainer(callbacks=[Throughput()])
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._since: float | None = None
        self._paused: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit."""
        self._tokens, self._since, self._paused = 0, None, None
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count tokens, and log at the steps that are logged."""
        now = time.perf_counter()
        if self._since is None:  # the first batch pays for compilation and allocation
            self._since = now
            return
        self._tokens += _num_tokens(pl_module, batch)
        if not is_logged_step(trainer) or now <= self._since:
            return
        ranks = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
        pl_module.log("train/tokens_per_second", self._tokens * ranks / (now - self._since), rank_zero_only=True)
        pl_module.log("train/peak_memory_mib", peak_memory_mib(pl_module.device), rank_zero_only=True)
        self._tokens, self._since = 0, now

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on."""
        if self._since is not None and self._paused is not None:
            self._since += time.perf_counter() - self._paused
        self._paused = None


def _num_tokens(pl_module: LightningModule, batch: Any) -> int:
    count = getattr(pl_module, "num_tokens_in_batch", None)
    if count is not None:
        return count(batch)
    ids = batch.get("input_ids") if isinstance(batch, dict) else batch
    return ids.numel() if isinstance(ids, torch.Tensor) else 0
