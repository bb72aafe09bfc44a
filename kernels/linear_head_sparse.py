"""Gradients of a linear head with Triton where some tiles of its logits are left out.

Shape key: N rows, D width, V vocabulary, B blocks of rows, T tiles of the vocabulary, t those of a strip.
"""

import torch
import triton
from torch import Tensor

from litropy.kernels.linear_head_skipping import add_skipped_smoothing
from litropy.kernels.linear_head_sparse_kernels import input_gradient_kernel, weight_gradient_kernel
from litropy.kernels.linear_head_types import Cotangents, Gradients, Head, RowStats
from litropy.kernels.tile_configs import TileConfig

__all__ = ["SparseTiles"]

# width of the part of dInput or dWeight that a program owns, and rows of a one-hot product
_BLOCK_W = 64
_BLOCK_K = 16
# rows of a gather of the targets' weights
_GATHERED_ROWS = 1024


class SparseTiles:
    """Products of the tiles that a backward pass keeps, and what the others have that is not softmax mass.

    Args:
        kept: which tiles each block of rows keeps, [B, T] bool.
        input: hidden states, [N, D + R].
        head: the head.
        target: token ids, [N].
        stats: what the forward pass found.
        cotangents: gradients of the statistics, 0 at ignored rows.
        gradients: where to add.
        sum_input: float32 sum of the input's gradient, [N, D + R].
        config: the tile.
    """

    def __init__(
        self,
        kept: Tensor,
        input: Tensor,
        head: Head,
        target: Tensor | None,
        stats: RowStats,
        cotangents: Cotangents,
        gradients: Gradients,
        sum_input: Tensor | None,
        config: TileConfig,
    ) -> None:
        self.kept, self.input, self.head, self.target, self.config = kept, input, head, target, config
        self.cotangents, self.gradients, self.sum_input = cotangents, gradients, sum_input
        if target is None or cotangents.logprob is None:
            self.g_target = None
            return
        # the one-hot part of rows whose target's tile is left out
        V, tile = head.weight.shape[0], target.clamp(0, head.weight.shape[0] - 1) // config.block_v
        block = torch.arange(len(target), device=target.device) // config.block_n
        outside = (target < 0) | (target >= V) | kept[block, tile]
        g = cotangents.logprob * _slope_at_target(head, stats)
        self.g_target = g.masked_fill(outside, 0).contiguous()
        # rows with nothing to add come last, beyond all tiles
        self.sorted_target, order = target.masked_fill(outside, V).sort(stable=True)
        self.order = order.to(torch.int32)
        if sum_input is not None:
            self._add_target_rows(sum_input, target.clamp(0, V - 1), self.g_target)

    def _add_target_rows(self, sum_input: Tensor, target: Tensor, g: Tensor) -> None:
        """Add each row's ``g W[y]``."""
        for first in range(0, len(target), _GATHERED_ROWS):
            rows = slice(first, first + _GATHERED_ROWS)
            for width, matrix in self.head.factors():
                sum_input[rows, width] += g[rows, None] * matrix[target[rows]].float()

    def multiply(self, dz: Tensor, columns: slice, tiles: slice) -> None:
        """Add the products of the kept tiles of a strip of logit gradients, [N, strip]."""
        kept, config, (N, V) = self.kept[:, tiles], self.config, (self.input.shape[0], self.head.weight.shape[0])
        blocks = {"BLOCK_N": config.block_n, "BLOCK_V": config.block_v, "BLOCK_W": _BLOCK_W, "num_warps": 4}
        blocks |= {"UPCAST": dz.device.type == "cpu" and dz.dtype == torch.bfloat16, "enable_fp_fusion": True}
        tiles_of_block, num_tiles = _lists(kept)
        blocks_of_tile, num_blocks = _lists(kept.t())
        if self.sum_input is not None:
            for width, matrix in self.head.factors():
                out = self.sum_input[:, width]
                input_gradient_kernel[(kept.shape[0], triton.cdiv(matrix.shape[1], _BLOCK_W))](
                    out, dz, matrix, tiles_of_block, num_tiles, N, V, matrix.shape[1], columns.start,
                    out.stride(0), dz.stride(0), *matrix.stride(), kept.shape[1], **blocks,
                )  # fmt: skip
        bounds = None
        if self.g_target is not None:
            edges = torch.arange(tiles.start, tiles.stop + 1, device=dz.device) * config.block_v
            bounds = torch.searchsorted(self.sorted_target, edges.clamp_max(V)).to(torch.int32)
        bias = self.gradients.bias
        outs = self.gradients.factors(self.head)
        if not outs and bias is not None:
            outs = [(slice(0, 1), self.input.new_empty(0))]
        for width, out in outs:
            hidden = self.input[:, width]
            weight_gradient_kernel[(kept.shape[1], triton.cdiv(hidden.shape[1], _BLOCK_W))](
                out, bias, dz, hidden, blocks_of_tile, num_blocks, self.order if bounds is not None else None, bounds,
                self.target, self.g_target, N, V, hidden.shape[1], columns.start, out.stride(0), dz.stride(0),
                *hidden.stride(), kept.shape[0], HAS_WEIGHT=bool(out.numel()), HAS_BIAS=bias is not None,
                HAS_TARGET=bounds is not None, BLOCK_K=_BLOCK_K, **blocks,
            )  # fmt: skip
            bias = None  # once, not once a factor

    def finish(self) -> None:
        """Add what label smoothing has in the tiles that were left out."""
        rows = torch.arange(self.input.shape[0], device=self.input.device) // self.config.block_n
        add_skipped_smoothing(
            self.kept[rows],
            self.config.block_v,
            self.input,
            self.head,
            self.target,
            self.cotangents,
            self.gradients,
            self.sum_input,
        )


def _slope_at_target(head: Head, stats: RowStats) -> Tensor | float:
    """The derivative d final / d raw of the target's logit, [N] or a number."""
    scale = head.inv_temperature if head.row_inv_temperature is None else head.row_inv_temperature
    if not head.softcap:
        return scale
    capped = (stats.logprob + stats.lse) / scale / head.softcap
    return scale * (1 - capped.square())


def _lists(kept: Tensor) -> tuple[Tensor, Tensor]:
    """The columns that each row of ``kept`` marks, first in its list, and how many there are; int32."""
    order = torch.argsort(kept.logical_not().to(torch.uint8), dim=1, stable=True)
    return order.to(torch.int32).contiguous(), kept.sum(1, dtype=torch.int32)
