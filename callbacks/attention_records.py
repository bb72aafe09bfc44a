"""Heat-maps of attention by layer and head, and arrays of all probes on disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["draw_heatmap", "save_arrays"]

_ARRAYS = ("entropy", "max_logit", "p_max", "rows", "non_finite_rows")


def save_arrays(folder: Path, steps: Sequence[int], layers: Sequence[str], values: np.ndarray) -> Path:
    """Write probes to ``step_<last step>.npz``: ``steps`` [P], ``layers`` [L], and five arrays [P, L, H].

    Args:
        folder: made if it is not there.
        steps: optimiser steps of the P probes.
        layers: names of the layers.
        values: [P, 5, L, H], as ``ProbeResult.values``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{steps[-1]:08d}.npz"
    temporary = path.with_name(f".{path.name}")
    arrays: dict[str, Any] = {name: values[:, index] for index, name in enumerate(_ARRAYS)}
    with temporary.open("wb") as file:
        np.savez_compressed(file, steps=np.asarray(steps), layers=np.asarray(layers), **arrays)
    return temporary.replace(path)


def draw_heatmap(step: int, layers: Sequence[str], entropy: np.ndarray, max_logit: np.ndarray) -> np.ndarray:
    """Draw entropy and largest logit, [L, H] each, side by side.

    Args:
        step: optimiser step, for the title.
        layers: names of the layers.
        entropy: mean normalised entropies, from 0 to 1.
        max_logit: largest logits.

    Returns:
        Image [height, width, 3], uint8.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    L, H = entropy.shape
    width, height = 2 * (1.8 + min(8, 0.25 * H)), 1.0 + min(12, 0.25 * L)
    # no pyplot: its global state would interfere with figures of the caller
    figure = Figure(figsize=(width, height), dpi=80)
    canvas = FigureCanvasAgg(figure)
    # a layout by hand, which takes a fraction of the time of an automatic one
    panels: Any = figure.subplots(1, 2, gridspec_kw={"left": 0.8 / width, "right": 1 - 0.1 / width, "wspace": 0.3})
    figure.subplots_adjust(bottom=0.45 / height, top=1 - 0.3 / height)
    values = (entropy, max_logit)
    titles = ("entropy / ln(visible keys)", f"largest logit, step {step}")
    for axes, panel, title, most in zip(panels, values, titles, (1.0, None), strict=True):
        image = axes.imshow(panel, aspect="auto", vmin=0.0 if most else None, vmax=most, interpolation="nearest")
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("head", fontsize=8)
        # names of at most about twenty layers are readable
        shown = range(0, L, -(-L // 20))
        axes.set_yticks(list(shown), [layers[index] for index in shown], fontsize=7)
        axes.set_xticks(range(0, H, -(-H // 8)))
        axes.tick_params(axis="x", labelsize=7)
        figure.colorbar(image, ax=axes).ax.tick_params(labelsize=7)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
