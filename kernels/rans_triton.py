"""rANS decoding by Triton: batches of segments, on a GPU or in the interpreter."""

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from litropy.kernels.rans_stream import LANES, RansBatch
from litropy.kernels.rans_triton_kernels import rans_decode_kernel

__all__ = ["SEGMENTS_PER_PROGRAM", "decode_batch"]

# of a program on a GPU: a processor holds fewer programs than warps
SEGMENTS_PER_PROGRAM = 4


def decode_batch(batch: RansBatch, out: Tensor) -> Tensor:
    """Decode into ``out`` [n] uint8, on its device.

    Returns:
        For each segment [S] whether it ended where it must: if not, its states or words are damaged.
    """
    device = out.device

    def put(x: NDArray[np.generic]) -> Tensor:
        # kernels take the bits of unsigned numbers
        return torch.from_numpy(x.view(f"i{x.itemsize}")).to(device)

    words = put(batch.words) if batch.words.size else torch.zeros(1, dtype=torch.int16, device=device)
    buckets_of = np.array([len(tables.divider) for tables in batch.tables])
    intact = torch.empty(len(batch.states), dtype=torch.uint8, device=device)
    for buckets in np.unique(buckets_of).tolist():
        kind = buckets_of == buckets
        # tables of this size are counted by themselves
        number = (np.cumsum(kind) - 1).astype(np.int32)
        divider, first, second = (
            put(np.stack([tables[i] for tables, wanted in zip(batch.tables, kind, strict=True) if wanted]))
            for i in range(3)
        )
        rows = np.flatnonzero(kind[batch.table_of])
        symbols = batch.symbols[rows]
        # the interpreter takes as long for a segment as for all
        together = SEGMENTS_PER_PROGRAM if device.type == "cuda" else triton.next_power_of_2(len(rows))
        result = torch.empty(len(rows), dtype=torch.uint8, device=device)
        rans_decode_kernel[(triton.cdiv(len(rows), together),)](
            divider,
            first,
            second,
            put(number[batch.table_of[rows]]),
            put(symbols),
            put(batch.output[rows]),
            put(batch.words_at[rows]),
            put(batch.words_of[rows]),
            put(batch.states[rows]),
            words,
            out,
            result,
            len(rows),
            triton.cdiv(int(symbols.max()), LANES),
            BUCKETS=buckets,
            ROWS=together,
            num_warps=SEGMENTS_PER_PROGRAM * LANES // _lanes_of_warp(device),
        )
        intact[torch.from_numpy(rows).to(device)] = result
    return intact.bool()


def _lanes_of_warp(device: torch.device) -> int:
    return triton.runtime.driver.active.get_current_target().warp_size if device.type == "cuda" else LANES
