"""How the PyTorch implementation of the linear head cuts its work into tiles that fit a workspace.

Shape key: N rows, D width, V vocabulary; n and v are the sizes of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from litropy.kernels.linear_head_types import Head

__all__ = [
    "Rows",
    "Workspace",
    "apply_slope_",
    "cached_parts",
    "final_logits_",
    "logit_elements",
    "ranges",
    "raw_logits",
    "scratch_elements",
    "tile_shape",
]

# elements that one elementwise pass works on: few enough that the next pass finds them in the cache
_CACHED = 1 << 18
# share of the budget that goes to the tile of logits; the rest is for scratch, sums and the matrix library
_LOGITS_SHARE = 0.7
# the same where a tile is some columns of many rows in half precision: its sums and scratch are float32, and matrix
# libraries rearrange what they multiply
_HALF_TILE_SHARE = 0.4
# narrower tiles would add up a gradient in too many small steps; matrix libraries like multiples of it
_MIN_COLUMNS = 64
# columns of one matrix product: measured to be up to a fifth faster on a CPU than all at once
_PRODUCT_COLUMNS = 8192
# more rows than this do not make the matrix products any faster
_MAX_ROWS = 16384


def ranges(total: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most ``step`` that cover ``total``."""
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def logit_elements(dtype: torch.dtype, budget: int) -> int:
    """How many logits of a dtype a workspace of ``budget`` bytes may hold."""
    return max(1, int(budget * _LOGITS_SHARE) // dtype.itemsize)


def scratch_elements(budget: int) -> int:
    """How many elements a scratch of the elementwise passes may have at most: four take an eighth of the budget."""
    return max(1, budget // 128)


@dataclass(frozen=True)
class Rows:
    """The rows that count, in blocks: views where all do, else gathered copies that leave ignored rows out.

    Only on a CPU are ignored rows looked up: anywhere else that would wait for the device.
    """

    input: Tensor  # [N, D]
    target: Tensor | None  # [N]
    valid: Tensor | None  # [M] indices, None for all

    @staticmethod
    def of(input: Tensor, target: Tensor | None) -> "Rows":
        """Find the rows that count."""
        if target is None or target.device.type != "cpu" or not bool((target < 0).any()):
            return Rows(input, target, None)
        return Rows(input, target, (target >= 0).nonzero()[:, 0])

    def __len__(self) -> int:
        return self.input.shape[0] if self.valid is None else self.valid.shape[0]

    def among(self, wanted: Tensor) -> "Rows":
        """Those of the rows that are marked in ``wanted`` [N] bool."""
        if self.valid is not None:
            return Rows(self.input, self.target, self.valid[wanted[self.valid]])
        index = wanted.nonzero()[:, 0]
        return self if len(index) == len(wanted) else Rows(self.input, self.target, index)

    def blocks(self, step: int) -> Iterator[tuple[Tensor | slice, Tensor, Tensor | None]]:
        """Yield the index of each block, its hidden states [n, D] and its targets [n]."""
        for part in ranges(len(self), step):
            index = part if self.valid is None else self.valid[part]
            yield index, self.input[index], None if self.target is None else self.target[index]


def tile_shape(rows: Rows, head: Head, budget: int, multiple: int = 1, gathers: bool = False) -> tuple[int, int]:
    """Rows and columns of a tile of logits; never narrower than 64 columns, however small the budget.

    Args:
        rows: the rows that count.
        head: the head.
        budget: workspace in bytes.
        multiple: the number of columns is a multiple of this, or all; V makes it whole rows.
        gathers: whether rows are copied, even where all of them count.
    """
    V, D = head.weight.shape
    if not V:  # an empty shard
        return max(1, min(len(rows), _MAX_ROWS)), 1
    share = _LOGITS_SHARE if head.weight.dtype == head.stats_dtype else _HALF_TILE_SHARE
    elements = max(1, int(budget * share) // head.weight.element_size())
    n = min(len(rows), _MAX_ROWS, elements // max(1, min(multiple, V)))
    if rows.valid is not None or gathers:  # gathered hidden states take room as well
        n = min(n, max(64, budget // (8 * D * head.weight.element_size())))
    v = min(V, scratch_elements(budget), elements // max(1, n))
    if n < len(rows):  # and so do the sums of the weight's gradient over several blocks
        v = min(v, max(_MIN_COLUMNS, budget // (8 * D * 4)))
    v = max(v, min(V, _MIN_COLUMNS))
    if multiple == 1 and v < V:
        multiple = min(v, _MIN_COLUMNS)
    return max(1, n), min(V, max(multiple, v // multiple * multiple))


class Workspace:
    """Buffers of one call, allocated once: a tile of logits, and cache-sized scratch for the elementwise passes."""

    def __init__(self, head: Head, n: int, v: int, budget: int, whole: bool = False) -> None:
        # ``whole``: the elementwise passes take all rows of a tile at a time
        self.cached = n * max(1, v) if whole else max(v, min(_CACHED, scratch_elements(budget)))
        scratch = min(n * v, self.cached)
        self.logits = head.weight.new_empty(n * v)
        self.is_half = head.weight.dtype != head.stats_dtype
        self.u, self.e, self.slope = (head.weight.new_empty(scratch, dtype=head.stats_dtype) for _ in range(3))
        self.z = self.logits if not self.is_half else head.weight.new_empty(scratch, dtype=head.stats_dtype)


def raw_logits(hidden: Tensor, head: Head, columns: slice, work: Workspace) -> Tensor:
    """``h W^T + u B^T + b`` of some vocabulary columns, [n, v], in the workspace and the head's dtype."""
    n, v, D = hidden.shape[0], columns.stop - columns.start, head.weight.shape[1]
    tile = work.logits[: n * v].view(n, v)
    weight = head.weight[columns].t()
    bias = None if head.bias is None else head.bias[columns]
    for part in ranges(v, _PRODUCT_COLUMNS if tile.device.type == "cpu" else v):
        if bias is None:
            torch.mm(hidden[:, :D], weight[:, part], out=tile[:, part])
        else:
            torch.addmm(bias[part], hidden[:, :D], weight[:, part], out=tile[:, part])
    if head.low_rank is not None:
        tile.addmm_(hidden[:, D:], head.low_rank[columns].t())
    return tile


def cached_parts(tile: Tensor, work: Workspace) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """Go through a tile [n, v] a few rows at a time: the rows, their logits in the statistics' dtype, scratch."""
    n, v = tile.shape
    for part in ranges(n, max(1, work.cached // max(1, v))):
        raw = tile[part]
        u, e, slope = (x[: raw.numel()].view(raw.shape) for x in (work.u, work.e, work.slope))
        yield part, work.z[: raw.numel()].view(raw.shape).copy_(raw) if work.is_half else raw, u, e, slope


def final_logits_(z: Tensor, head: Head, slope: Tensor | None = None) -> None:
    """Turn raw logits [n, v] into final ones in place; d final / d raw goes to ``slope`` where it is not 1.

    Args:
        z: raw logits.
        head: softcap and temperatures, as these rows see them.
        slope: scratch of the shape of ``z``.
    """
    per_row = head.row_inv_temperature
    scale = head.inv_temperature if per_row is None else per_row[:, None].to(z.dtype)
    if head.softcap:
        z.div_(head.softcap).tanh_()
        if slope is not None:
            torch.mul(z, z, out=slope).neg_().add_(1).mul_(scale)
        z.mul_(head.softcap)
    elif slope is not None and head.has_slope:
        slope.copy_(scale) if isinstance(scale, Tensor) else slope.fill_(scale)
    if isinstance(scale, Tensor) or scale != 1:
        z.mul_(scale)


def apply_slope_(dz: Tensor, slope: Tensor, head: Head) -> Tensor:
    """Chain a gradient with respect to final logits to raw ones, in place."""
    return dz.mul_(slope) if head.has_slope else dz
