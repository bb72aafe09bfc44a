"""How long a training step waits for a checkpoint: written at once, or in the background."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins import AsyncCheckpointIO

from litropy.callbacks.compressed_checkpoint_io import CompressedCheckpointIO


def saving(elements: int, rounds: int) -> dict[str, Any]:
    """Milliseconds until a save returns, medians; the copy is what the background has to be given.

    Args:
        elements: Gaussian numbers of the weights, and of each of two moments.
        rounds: how often.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(elements, generator=generator) for name in ("weight", "exp_avg", "exp_avg_sq")}
    found: dict[str, Any] = {"bytes": sum(x.nbytes for x in tensors.values())}
    plugins = {
        "torch.save": lambda: TorchCheckpointIO(),
        "compressed": lambda: CompressedCheckpointIO(),
        "compressed, in the background": lambda: AsyncCheckpointIO(CompressedCheckpointIO()),
    }
    with tempfile.TemporaryDirectory() as folder:
        found["copy_ms"] = _median_ms([_copying(tensors) for _ in range(rounds + 1)])
        for name, make in plugins.items():
            seconds = [_waiting(make(), tensors, Path(folder, "x.ckpt")) for _ in range(rounds + 1)]
            found[f"{name}_ms"] = _median_ms(seconds)
    return found


def _median_ms(seconds: list[float]) -> float:
    """Without the first, which compiles and loads."""
    return round(1e3 * statistics.median(seconds[1:]), 1)


def _copying(tensors: dict[str, torch.Tensor]) -> float:
    start = time.perf_counter()
    copies = [x.clone() for x in tensors.values()]
    seconds = time.perf_counter() - start
    del copies
    return seconds


def _waiting(plugin: CheckpointIO, tensors: dict[str, torch.Tensor], path: Path) -> float:
    start = time.perf_counter()
    plugin.save_checkpoint({"state_dict": tensors}, path)
    seconds = time.perf_counter() - start
    plugin.teardown()
    return seconds
