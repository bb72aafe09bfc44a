"""``last.ckpt``: the checkpoint from which a stopped run goes on, and Ctrl-C, which writes it."""

import shutil
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from litropy.callbacks.logged_steps import total_steps

__all__ = ["LastCheckpoint"]

# ranks agree on Ctrl-C by a collective, which is too dear for every step
_STEPS_BETWEEN_AGREEMENTS = 10


class LastCheckpoint(Checkpoint):
    """Keep ``last.ckpt`` up to date, and make Ctrl-C stop training where it can go on.

    Saves every ``every_n_train_steps`` optimiser steps, after each validation, at the end, and on Ctrl-C, always when
    an optimiser step is complete, so that a run continued from the file equals one that was never stopped. The first
    Ctrl-C finishes the step (and its validation, if it is due), a second one stops at once.

    Args:
        dirpath: folder of ``last.ckpt``; None takes ``checkpoints`` in the run folder.
        every_n_train_steps: optimiser steps between two saves; 0 saves only at the other occasions.

    Raises:
        ValueError: if ``every_n_train_steps`` is negative.

    Example::

        trainer = Trainer(callbacks=[LastCheckpoint(every_n_train_steps=100)])
    """

    def __init__(self, dirpath: str | Path | None = None, every_n_train_steps: int = 500) -> None:
        super().__init__()
        if every_n_train_steps < 0:
            raise ValueError(f"`every_n_train_steps` is {every_n_train_steps}; it must be at least 0.")
        self.dirpath = dirpath
        self.every_n_train_steps = every_n_train_steps
        self.interrupted = False
        self.path: Path | None = None
        self._saved_step = -1
        self._seen_step = -1
        self._stopping = False
        self._total_steps = float("inf")
        self._previous_handler: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agree on the path."""
        if stage != "fit":
            return
        # log_dir is a collective call
        folder = Path(trainer.log_dir or trainer.default_root_dir, "checkpoints")
        self.path = (Path(self.dirpath) if self.dirpath else folder) / "last.ckpt"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over Ctrl-C."""
        self.interrupted = self._stopping = False
        self._saved_step = self._seen_step = trainer.global_step
        self._total_steps = total_steps(trainer)
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGINT, self._on_interrupt)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time; only when an optimiser step is complete."""
        step = trainer.global_step
        if step == self._seen_step:
            return
        self._seen_step = step
        due = self.every_n_train_steps and step % self.every_n_train_steps == 0
        self._stopping = self._agreed_to_stop(trainer)
        if due or self._stopping or step >= self._total_steps:
            self._save(trainer)

    def _agreed_to_stop(self, trainer: Trainer) -> bool:
        if trainer.world_size == 1:
            return self.interrupted
        if trainer.global_step % _STEPS_BETWEEN_AGREEMENTS:
            return False
        return trainer.strategy.reduce_boolean_decision(self.interrupted, all=False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop here, where the last step is logged and validated."""
        if self._stopping:
            self.interrupted = True
            raise KeyboardInterrupt

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save with the validation done, even if its step has been saved already."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of an epoch, unless its last step has been saved already."""
        if trainer.global_step != self._saved_step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        assert self.path is not None
        if _writes_later(trainer.strategy):
            # there is nothing to rename yet; a file, unlike a folder, takes its name when it is complete
            trainer.save_checkpoint(self.path)
        else:
            # a sharded checkpoint is a folder that would be written in place
            new = self.path.with_suffix(".new")
            trainer.save_checkpoint(new)
            if trainer.is_global_zero:
                if self.path.is_dir():
                    shutil.rmtree(self.path)
                new.replace(self.path)
            trainer.strategy.barrier()
        self._saved_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give Ctrl-C back."""
        self._restore_handler()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give Ctrl-C back."""
        self._restore_handler()

    def _restore_handler(self) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGINT, self._previous_handler)
            self._previous_handler = None


def _writes_later(strategy: Strategy) -> bool:
    """Whether saving returns before the file is written."""
    if isinstance(strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
        return False  # their folders are written at once, whatever the plugin is
    plugin: CheckpointIO | None = strategy.checkpoint_io
    while isinstance(plugin, _WrappingCheckpointIO):
        if isinstance(plugin, AsyncCheckpointIO):
            return True
        plugin = plugin.checkpoint_io
    return False
