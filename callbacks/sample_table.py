"""Keep some responses of a policy to read: in a file of the run, and with loggers that take text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from litropy.callbacks.policy_readings import PolicyReadings, PolicySample, publisher

__all__ = ["SampleTable", "sample_table"]

_COLUMNS = ("prompt", "response", "reward", "correct", "answer")


def sample_table(samples: Sequence[PolicySample]) -> str:
    r"""Samples as a Markdown table.

    Example::

        >>> print(sample_table([PolicySample("7=", "3+4", 1.0, True, "3+4", 0)]))
        | prompt | response | reward | correct | answer |
        | --- | --- | --- | --- | --- |
        | 7= | 3+4 | 1.0 | True | 3+4 |
    """
    rows = [_COLUMNS, ["---"] * len(_COLUMNS), *([str(getattr(s, name)) for name in _COLUMNS] for s in samples)]
    cells = [[cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


class SampleTable(Callback):
    """Write some responses, with their rewards, every some steps.

    They go to ``samples.jsonl`` in the run's folder, one record a line: step, prompt, response, reward, correct,
    answer; and as a table ``samples`` to loggers that take text: TensorBoard, and those with a method ``log_text`` of
    columns and rows, as Weights and Biases has it. The file holds responses of the first rank; a continued run goes on
    in it.

    Args:
        every_n_steps: optimiser steps from one table to the next; a batch with several counts when it ends.
        rows: responses of a table, of different prompts as far as there are.

    Raises:
        ValueError: if a number is under 1; when training starts, if the module is no policy that can be watched.

    Example::

        trainer = Trainer(callbacks=[SampleTable(every_n_steps=20)])
    """

    def __init__(self, every_n_steps: int = 50, rows: int = 8) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("rows", rows)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1.")
        self.every_n_steps, self.rows = every_n_steps, rows
        self.path: Path | None = None
        self._seen: PolicyReadings | None = None
        self._last = -1  # how many times `every_n_steps` had passed at the latest table

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the file, and drop from it what a continued run writes again."""
        publisher(pl_module, self)
        self._seen = None
        folder = trainer.log_dir or trainer.default_root_dir  # every rank has to ask
        if not trainer.is_global_zero:
            return
        self.path = Path(folder, "samples.jsonl")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step(line) < trainer.global_step]
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a table if one is due."""
        found = publisher(pl_module, self).policy_readings()
        if found is None or found is self._seen or found.step // self.every_n_steps == self._last:
            return
        self._seen, self._last = found, found.step // self.every_n_steps
        if self.path is None:
            return
        chosen = _spread(found.samples, self.rows)
        with self.path.open("a", encoding="utf-8") as file:
            for sample in chosen:
                record = {"step": found.step} | {name: getattr(sample, name) for name in _COLUMNS}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", sample_table(chosen), found.step)
            elif hasattr(logger, "log_text"):
                rows = [[getattr(sample, name) for name in _COLUMNS] for sample in chosen]
                logger.log_text(key="samples", columns=list(_COLUMNS), data=rows, step=found.step)

    def state_dict(self) -> dict[str, Any]:
        """When the latest table was written."""
        return {"last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        self._last = state_dict["last"]


def _spread(samples: Sequence[PolicySample], rows: int) -> list[PolicySample]:
    """The first response to each prompt, then the second, until there are enough."""
    place: dict[int, int] = {}
    order = []
    for index, sample in enumerate(samples):
        place[sample.group] = place.get(sample.group, -1) + 1
        order.append((place[sample.group], index))
    return [samples[index] for _, index in sorted(order)[:rows]]


def _step(line: str) -> float:
    """Step of a record; infinite for a line that a killed process left unfinished."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
