"""metrics.csv with one row a step, which a continued run appends to."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

__all__ = ["MetricsFile", "MetricsTable", "read_metrics"]


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    r"""Read a metrics file as rows of numbers; empty cells are left out, and so is a row cut off in the middle.

    Args:
        path: a ``metrics.csv`` with a column ``step``.

    Example::

        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "metrics.csv")
        >>> _ = path.write_text("step,train/loss,val/loss\n0,9.5,\n1,9.0,9.2\n")
        >>> read_metrics(path)
        [{'step': 0.0, 'train/loss': 9.5}, {'step': 1.0, 'train/loss': 9.0, 'val/loss': 9.2}]
    """
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                rows.append({key: float(value) for key, value in row.items() if value != ""})
            except (TypeError, ValueError):  # a killed process leaves the last line unfinished
                continue
    return [row for row in rows if "step" in row]


class MetricsTable:
    """The rows of one metrics file, kept by step; what Lightning calls an experiment.

    Values of one step share a row, so training and validation metrics do not repeat steps. New rows are appended; the
    file is written anew only when an earlier row or the set of columns changes.

    Args:
        log_dir: folder of the file; rows that are there already are kept.
    """

    def __init__(self, log_dir: str | Path) -> None:
        self.log_dir = str(log_dir)
        self.path = Path(log_dir, "metrics.csv")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: dict[int, dict[str, float]] = {}
        if self.path.is_file():
            self.rows = {int(row.pop("step")): row for row in read_metrics(self.path)}
        self._columns = sorted({key for row in self.rows.values() for key in row})
        self._unsaved: set[int] = set()
        self._rewrite = bool(self.rows)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Set values of a step."""
        step = max(self.rows, default=-1) + 1 if step is None else int(step)
        values = {key: float(value) for key, value in metrics.items()}
        written = step in self.rows and step not in self._unsaved
        self._rewrite |= written or step < next(reversed(self.rows), -1)
        if new := set(values) - set(self._columns):
            self._columns = sorted([*self._columns, *new])
            self._rewrite = True
        self.rows.setdefault(step, {}).update(values)
        self._unsaved.add(step)

    def log_hparams(self, params: Mapping[str, Any]) -> None:
        """Ignore hyperparameters: they are in the run's ``config.yaml``."""

    def drop_from(self, step: int) -> None:
        """Forget the rows of a step and of all later ones: those that a killed run logged after its checkpoint."""
        kept = {number: row for number, row in self.rows.items() if number < step}
        self._rewrite |= len(kept) < len(self.rows)
        self.rows = kept
        self._unsaved &= set(kept)

    def save(self) -> None:
        """Write what is new; a file that is written anew appears whole or not at all."""
        if self._rewrite:
            self.rows = dict(sorted(self.rows.items()))
            temporary = self.path.with_suffix(".csv.tmp")
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["step", *self._columns])
                writer.writerows(self._cells(step) for step in self.rows)
            os.replace(temporary, self.path)
        elif self._unsaved:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows(self._cells(step) for step in sorted(self._unsaved))
        self._rewrite = False
        self._unsaved.clear()

    def _cells(self, step: int) -> list[Any]:
        row = self.rows[step]
        return [step, *(f"{row[column]:.9g}" if column in row else "" for column in self._columns)]


class MetricsFile(CSVLogger):
    """Log to ``<save_dir>/<name>/version_<version>/metrics.csv``, one row a step, and append to a file that is there.

    Lightning's own CSV logger deletes such a file.

    Args:
        save_dir: folder of all runs.
        name: name of the run's config.
        version: number of the run; None takes the next free one.
    """

    def __init__(self, save_dir: str | Path, name: str = "run", version: int | None = None) -> None:
        super().__init__(save_dir, name=name, version=version)

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsTable:
        """The rows of the file."""
        if self._experiment is None:
            self._experiment = MetricsTable(self.log_dir)  # type: ignore[assignment]
        return self._experiment  # type: ignore[return-value]

    @rank_zero_only
    def continue_at(self, step: int) -> None:
        """Forget the rows of ``step`` and of all later ones, which a continued run logs again."""
        self.experiment.drop_from(step)
        self.experiment.save()
