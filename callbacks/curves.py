"""curves.png: losses, entropy, learning rate and speed of a run, drawn from its metrics.csv."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from litropy.callbacks.metrics_file import read_metrics

__all__ = ["Curves", "plot_curves"]

Rows = Sequence[Mapping[str, float]]


def plot_curves(rows: Rows, path: str | Path, title: str = "") -> None:
    """Draw the curves of a run.

    Args:
        rows: rows of a metrics file, as ``read_metrics`` gives them.
        path: image to write; its suffix sets the format.
        title: text above the curves.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # no pyplot: its global state would interfere with figures of the caller
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    losses, entropy, rate, speed = figure.subplots(2, 2).flat
    _line(losses, rows, "train/loss", "train", color="#4c72b0", alpha=0.8)
    _line(losses, rows, "val/loss", "held out", color="#c44e52", marker="o", markersize=3)
    unigram = [row["data/unigram_entropy"] for row in rows if "data/unigram_entropy" in row]
    if unigram:
        losses.axhline(unigram[-1], color="0.4", linestyle="--", linewidth=1, label="unigram entropy of the data")
    _finish(losses, "loss [nats per token]")
    _line(entropy, rows, "entropy/output", "train", color="#4c72b0", alpha=0.8)
    _line(entropy, rows, "val/entropy", "held out", color="#c44e52", marker="o", markersize=3)
    _finish(entropy, "entropy of the output [nats]")
    _line(rate, rows, "train/learning_rate", "", color="#55a868")
    _finish(rate, "learning rate")
    _line(speed, rows, "train/tokens_per_second", "", color="#8172b2")
    _finish(speed, "speed [tokens/s]")
    speed.set_ylim(bottom=0)
    temporary = Path(path).with_name(f".{Path(path).name}")
    figure.savefig(temporary, dpi=120, format=Path(path).suffix.lstrip(".") or "png")
    temporary.replace(path)


def _line(axes: Any, rows: Rows, name: str, label: str, **style: Any) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        steps, values = zip(*points, strict=True)
        # a single point would be invisible as a line
        axes.plot(steps, values, label=label, **({"marker": "o"} if len(points) == 1 else {}) | style)


def _finish(axes: Any, label: str) -> None:
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.lines:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color="0.5")
    elif any(line.get_label() and not line.get_label().startswith("_") for line in axes.lines):
        axes.legend(frameon=False, fontsize=9)


class Curves(Callback):
    """Draw ``curves.png`` beside the metrics file when training ends; needs a CSV logger.

    Args:
        filename: name of the image.

    Example::

        trainer = Trainer(logger=MetricsFile("runs"), callbacks=[Curves()])
    """

    def __init__(self, filename: str = "curves.png") -> None:
        self.filename = filename

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
        if not loggers:
            rank_zero_warn("No curves are drawn: they are read from metrics.csv, which needs a CSV logger.")
            return
        loggers[0].save()
        folder = Path(loggers[0].log_dir)
        if (folder / "metrics.csv").is_file():
            title = "/".join(folder.absolute().parts[-2:])
            plot_curves(read_metrics(folder / "metrics.csv"), folder / self.filename, title)
