"""curves.png: losses, entropy, learning rate, speed, and alarms of a run, drawn from its metrics.csv."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from litropy.callbacks.metrics_file import read_metrics

__all__ = ["Curves", "clips", "learning_rate_cuts", "plot_curves"]

Rows = Sequence[Mapping[str, float]]

# what monitors log for every layer
_BY_LAYER = {
    "entropy/attention/layer_": "attention entropy / ln(visible keys)",
    "representation/effective_rank/layer_": "effective rank of representations",
}
_ALARM = "collapse/alarm"


def plot_curves(rows: Rows, path: str | Path, title: str = "") -> None:
    """Draw the curves of a run; of right answers, monitors and the collapse detector, those that were there.

    Args:
        rows: rows of a metrics file, as ``read_metrics`` gives them.
        path: image to write; its suffix sets the format.
        title: text above the curves.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # no pyplot: its global state would interfere with figures of the caller
    logged = {name for row in rows for name in row}
    by_layer = [prefix for prefix in _BY_LAYER if any(name.startswith(prefix) for name in logged)]
    answered, alarmed = bool(logged & {"reward/correct", "val/pass_at_1"}), _ALARM in logged
    panels: list[Callable[[Any, Rows], None]] = [partial(_layers, prefix=prefix) for prefix in by_layer]
    panels += [*[_answers] * answered, *[_alarms] * alarmed]
    lines = 2 + (len(panels) + 1) // 2
    figure = Figure(figsize=(10, 3.25 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    losses, entropy, rate, speed, *others = figure.subplots(lines, 2).flat
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
    for axes, panel in zip(others, panels, strict=False):
        panel(axes, rows)
    for axes in others[len(panels) :]:
        axes.remove()
    for axes in (losses, *others[: len(by_layer)]):
        for step in learning_rate_cuts(rows):
            axes.axvline(step, color="0.4", linestyle=":", linewidth=1)
    temporary = Path(path).with_name(f".{Path(path).name}")
    figure.savefig(temporary, dpi=120, format=Path(path).suffix.lstrip(".") or "png")
    temporary.replace(path)


def _line(axes: Any, rows: Rows, name: str, label: str, **style: Any) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        steps, values = zip(*points, strict=True)
        # a single point would be invisible as a line
        axes.plot(steps, values, label=label, **({"marker": "o"} if len(points) == 1 else {}) | style)


def _layers(axes: Any, rows: Rows, prefix: str) -> None:
    """A line for each layer, from dark to light."""
    from matplotlib import colormaps

    layers = sorted({int(name.removeprefix(prefix)) for row in rows for name in row if name.startswith(prefix)})
    for index, layer in enumerate(layers):
        # names of many layers would cover the lines
        label = f"layer {layer}" if len(layers) <= 6 or layer in (layers[0], layers[-1]) else ""
        color = colormaps["viridis"](0.9 * index / max(1, len(layers) - 1))
        _line(axes, rows, f"{prefix}{layer}", label, color=color, linewidth=1)
    _finish(axes, _BY_LAYER[prefix])


def _answers(axes: Any, rows: Rows) -> None:
    """Shares of right answers, where a policy learns from rewards."""
    _line(axes, rows, "reward/correct", "train", color="#4c72b0", alpha=0.8)
    _line(axes, rows, "val/pass_at_1", "held out", color="#c44e52", marker="o", markersize=3)
    axes.set_ylim(-0.02, 1.02)
    _finish(axes, "share of right answers")


def _alarms(axes: Any, rows: Rows) -> None:
    """The level of alarms, and when remedies acted."""
    _line(axes, rows, _ALARM, "", color="#c44e52", drawstyle="steps-post")
    marks = {"learning rate cut": ("v", 2.25, learning_rate_cuts(rows)), "heads scaled down": ("^", 2.5, clips(rows))}
    for label, (marker, height, steps) in marks.items():
        if steps:
            axes.plot(steps, [height] * len(steps), label=label, color="0.3", marker=marker, linestyle="", markersize=5)
    axes.set_ylim(-0.1, 2.8)
    _finish(axes, "alarm")
    axes.set_yticks([0, 1, 2], ["none", "warning", "critical"])


def learning_rate_cuts(rows: Rows) -> list[float]:
    """Steps at which an alarm lowered the learning rate."""
    factors = [(row["step"], row[name]) for row in rows if (name := "train/learning_rate_factor") in row]
    return [step for (_, before), (step, now) in itertools.pairwise(factors) if now < before]


def clips(rows: Rows) -> list[float]:
    """Steps at which queries and keys were scaled; a row that repeats what was logged before is none."""
    names = ("qk_clip/max_logit", "qk_clip/clipped_heads")
    found = [(row["step"], row[names[0]], row[names[1]]) for row in rows if names[1] in row]
    before = [None, *(logit for _, logit, _ in found)]
    return [step for (step, logit, heads), last in zip(found, before, strict=False) if heads > 0 and logit != last]


def _finish(axes: Any, label: str) -> None:
    axes.set_xlabel("step")
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
