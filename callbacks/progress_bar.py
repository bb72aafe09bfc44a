"""A progress bar that counts optimiser steps; one line now and then where there is no terminal."""

import math
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from litropy.callbacks.logged_steps import is_logged_step, total_steps

__all__ = ["StepProgressBar", "format_count", "format_duration"]

_EVALUATION = {"validate": "validating", "test": "testing", "predict": "predicting"}


def format_count(value: float) -> str:
    """Write a number with three digits and a unit.

    Example::

        >>> [format_count(x) for x in (7, 950, 12345, 3.21e6, 6e8)]
        ['7', '950', '12.3k', '3.21M', '600M']
    """
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit * 0.9995:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def format_duration(seconds: float) -> str:
    """Write a time as minutes and seconds, or with hours.

    Example::

        >>> [format_duration(x) for x in (5.4, 75, 3725, float("inf"))]
        ['0:05', '1:15', '1:02:05', '-:--']
    """
    if not math.isfinite(seconds):
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class StepProgressBar(ProgressBar):
    """Show step and total, time left, losses and tokens a second.

    Metrics are read at the steps that are logged (``log_every_n_steps``), so the bar never waits for the device by
    itself. Where the output is not a terminal, one plain line appears every ``seconds_between_lines``.

    Args:
        metrics: logged metrics to show, with the labels to show them under.
        seconds_between_lines: pause between two lines where the output is not a terminal, in seconds.

    Example::

        trainer = Trainer(callbacks=[StepProgressBar()])
    """

    def __init__(self, metrics: dict[str, str] | None = None, seconds_between_lines: float = 10.0) -> None:
        super().__init__()
        self.metrics = metrics or {
            "train/loss": "loss",
            "val/loss": "val loss",
            "train/tokens_per_second": "tokens/s",
        }
        self.seconds_between_lines = seconds_between_lines
        self.console = Console(highlight=False, soft_wrap=True)
        self._enabled = True
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._text = ""
        self._start = (0, 0.0)
        self._last_line = 0.0
        self._printed = -1
        self._total = math.inf

    def disable(self) -> None:
        """Show nothing, as on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar."""
        self._enabled = True

    # drawing

    def _open(self, description: str, total: float, completed: int = 0) -> None:
        self._close()
        self._total, self._text = total, ""
        self._start, self._printed = (completed, time.perf_counter()), completed
        self._last_line = -math.inf
        if self._enabled and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[steps]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[text]}"),
            )
            self._progress = Progress(*columns, console=self.console, refresh_per_second=4)
            limit = total if math.isfinite(total) else None
            self._task = self._progress.add_task(
                description, total=limit, completed=completed, steps=self._steps(completed), text=""
            )
            self._progress.start()

    def _steps(self, done: int) -> str:
        return f"{done}/{int(self._total)}" if math.isfinite(self._total) else str(done)

    def _show(self, done: int, line: bool) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, steps=self._steps(done), text=self._text)
        elif self._enabled and line and done != self._printed:
            first, since = self._start
            now = time.perf_counter()
            left = (now - since) / max(1, done - first) * (self._total - done)
            self._last_line, self._printed = now, done
            self.console.print(f"step {self._steps(done)}  {self._text}  {format_duration(left)} left")

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        if self._enabled:
            self.console.print(*args, **kwargs)

    # training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the step at which training starts or goes on."""
        self._open("training", total_steps(trainer), trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on, and read the metrics if they are logged now."""
        logged = is_logged_step(trainer)
        if logged:
            self._read(trainer)
        step = trainer.global_step
        waited = time.perf_counter() - self._last_line >= self.seconds_between_lines
        self._show(step, line=logged and waited)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the losses of a validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._read(trainer)
            self._show(trainer.global_step, line=True)
        elif trainer.state.fn == "validate":
            self._close()

    def _read(self, trainer: Trainer) -> None:
        values = trainer.callback_metrics
        shown = ((label, float(values[name])) for name, label in self.metrics.items() if name in values)
        self._text = "  ".join(
            f"{label} {value:.3f}" if label != "tokens/s" else f"{format_count(value)} tokens/s"
            for label, value in shown
        )

    # evaluation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar, unless this validation is part of training."""
        if trainer.state.fn == "validate":
            self._open_evaluation(trainer, trainer.num_val_batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar."""
        self._open_evaluation(trainer, trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar."""
        self._open_evaluation(trainer, trainer.num_predict_batches)

    def _open_evaluation(self, trainer: Trainer, batches: Any) -> None:
        assert trainer.state.fn is not None
        total = sum(batches) if isinstance(batches, list) else batches
        self._open(_EVALUATION[trainer.state.fn.value], total)

    def _advance(self) -> None:
        if self._progress is not None and self._task is not None:
            self._show(int(self._progress.tasks[0].completed) + 1, line=False)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Move on."""
        if trainer.state.fn == "validate":
            self._advance()

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Move on."""
        self._advance()

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Move on."""
        self._advance()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last step, and close the bar."""
        self._read(trainer)
        self._show(trainer.global_step, line=True)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the terminal is as before."""
        self._close()
