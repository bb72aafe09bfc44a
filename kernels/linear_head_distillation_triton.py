"""How the Triton kernel of distillation is launched.

Shape key: n rows of a block, V vocabulary.
"""

import math
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from litropy.kernels.linear_head_distillation_kernels import distillation_kernel
from litropy.kernels.linear_head_types import Head

if TYPE_CHECKING:
    from litropy.kernels.linear_head_distillation import Divergence

__all__ = ["block_divergence"]

_BLOCK_ROW = 2048
_KINDS = ("forward_kl", "reverse_kl", "jsd")


def block_divergence(
    tile: Tensor,
    teacher_tile: Tensor,
    head: Head,
    teacher: Head,
    mask: Tensor,
    row_weight: Tensor,
    divergence: "Divergence",
    has_gradient: bool,
) -> Tensor:
    """Turn raw logits [n, V] into the gradient of the weighted divergence in place; return that of each row, [n]."""
    n, V = tile.shape
    losses = torch.empty(n, dtype=torch.float32, device=tile.device)
    beta = divergence.beta
    mixed = divergence.kind == "jsd"
    distillation_kernel[(n,)](
        tile, teacher_tile, row_weight.contiguous(), mask.to(torch.uint8), head.row_inv_temperature,
        teacher.row_inv_temperature, losses, V, tile.stride(0), teacher_tile.stride(0), head.softcap, teacher.softcap,
        head.inv_temperature, teacher.inv_temperature, beta, math.log(beta) if mixed else 0.0,
        math.log1p(-beta) if mixed else 0.0, HAS_SOFTCAP=bool(head.softcap), HAS_TEACHER_SOFTCAP=bool(teacher.softcap),
        HAS_SCALE=head.row_inv_temperature is not None, HAS_TEACHER_SCALE=teacher.row_inv_temperature is not None,
        WANT_GRADIENT=has_gradient, DIVERGENCE=_KINDS.index(divergence.kind),
        BLOCK_V=min(_BLOCK_ROW, triton.next_power_of_2(V)), num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return losses
