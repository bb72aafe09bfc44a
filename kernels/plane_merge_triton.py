"""Byte planes to words by Triton, on a GPU or in the interpreter."""

import torch
import triton
from torch import Tensor

from litropy.kernels.plane_merge_kernels import merge_kernel

__all__ = ["BLOCK", "merge_planes"]

BLOCK = 1024
_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


def merge_planes(planes: Tensor, kind: int, base: Tensor | None, out: Tensor) -> None:
    """Planes [bytes of a word, n] uint8 to values of any dtype, as ``merge_planes_torch`` does in several passes."""
    width, n = planes.shape
    merged = out.view(_UNSIGNED[width])
    others = merged if base is None else base.view(merged.dtype)
    merge_kernel[(triton.cdiv(n, BLOCK),)](
        planes, others, merged, n, PLANES=width, KIND=kind, HAS_BASE=base is not None, BLOCK=BLOCK
    )
