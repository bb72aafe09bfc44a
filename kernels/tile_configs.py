"""Tile sizes of the Triton kernels, by dtype and device.

``python -m litropy.kernels.compile_report`` shows what they take on every target; all fit the shared memory.
"""

from dataclasses import dataclass, replace

import torch

__all__ = ["TileConfig", "attention_tile_config", "tile_config"]


@dataclass(frozen=True)
class TileConfig:
    """Block sizes and launch options of a kernel over tiles of logits."""

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    # a program for each processor, which goes through several tiles, in place of one for each tile
    persistent: bool = False


def tile_config(dtype: torch.dtype, backend: str = "cuda", tma: bool = False, heavy: bool = False) -> TileConfig:
    """Choose the tile of the linear head's kernels; rows and columns depend on dtype and ``heavy`` alone.

    Args:
        dtype: dtype of the matrix products.
        backend: Triton's name for the device, ``"cuda"`` or ``"hip"``.
        tma: whether operands come through tensor descriptors (Hopper and Blackwell).
        heavy: whether so many statistics are wanted that a tile must be narrower to stay in registers.
    """
    config = _config(dtype, backend, tma)
    return replace(config, block_v=config.block_v // 2) if heavy else config


def _config(dtype: torch.dtype, backend: str, tma: bool) -> TileConfig:
    if dtype == torch.float32:  # no tensor cores at full precision: small tiles keep the accumulators in registers
        return TileConfig(64, 64, 32, num_warps=8 if tma else 4, num_stages=2)
    if tma:  # 128 bytes of a row at a time, the widest swizzle
        return TileConfig(128, 128, 64, num_warps=8, num_stages=3, persistent=True)
    return TileConfig(128, 128, 32, num_warps=8, num_stages=2 if backend == "hip" else 4)


def attention_tile_config(dtype: torch.dtype, width: int) -> TileConfig:
    """Choose the tile of the attention kernels, rows by keys by a part of the heads' ``width``."""
    stages = 2 if width <= 128 else 1  # every part of the keys has its own buffers
    if dtype == torch.float32:
        return TileConfig(32, 32, 32, num_warps=4, num_stages=stages)
    return TileConfig(64, 64, 64, num_warps=8, num_stages=stages)
