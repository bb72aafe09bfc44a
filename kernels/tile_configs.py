"""Tile sizes of the Triton kernels, by dtype and device.

``python -m litropy.kernels.compile_report`` shows what they take on every target; all fit the shared memory.
"""

from dataclasses import dataclass

import torch

__all__ = ["TileConfig", "tile_config"]


@dataclass(frozen=True)
class TileConfig:
    """Block sizes and launch options of a kernel over tiles of logits."""

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int


def tile_config(dtype: torch.dtype, backend: str = "cuda") -> TileConfig:
    """Choose the tile for inputs of ``dtype``; ``backend`` is Triton's name, ``"cuda"`` or ``"hip"``."""
    if dtype == torch.float32:  # no tensor cores at full precision: small tiles keep the accumulators in registers
        return TileConfig(64, 64, 32, num_warps=4, num_stages=2)
    return TileConfig(128, 128, 32, num_warps=8, num_stages=2 if backend == "hip" else 4)
