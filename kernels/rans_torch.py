"""rANS decoding in PyTorch, over all segments and lanes at once: runs wherever PyTorch does."""

import numpy as np
import torch
from torch import Tensor

from litropy.kernels.rans_stream import LANES, LOWEST_STATE, RansBatch, lookup_tables
from litropy.kernels.rans_tables import PRECISION, TOTAL

__all__ = ["decode_batch"]

_MASK = TOTAL - 1


def decode_batch(batch: RansBatch, out: Tensor) -> Tensor:
    """Decode into ``out`` [n] uint8, on its device.

    Returns:
        For each segment [S] whether it ended where it must: if not, its states or words are damaged.
    """
    device = out.device
    # numbers up to 2^32, which PyTorch computes with in int64 only
    table, states, table_of = lookup_tables(batch).astype("i8"), batch.states.astype("i8"), batch.table_of.astype("i8")
    entries = torch.from_numpy(table).to(device).flatten()
    state, offset = torch.from_numpy(states).to(device), torch.from_numpy(table_of).to(device)[:, None] * TOTAL
    # past the end a damaged segment reads anything; its position tells
    words = torch.from_numpy(np.pad(batch.words, (0, 1)).astype("i8")).to(device)
    position, words_of = torch.from_numpy(batch.words_at).to(device), torch.from_numpy(batch.words_of).to(device)
    end = position + words_of
    symbols = torch.from_numpy(batch.symbols).to(device)[:, None]
    longest = int(batch.symbols.max())
    rows = torch.empty(len(states), -(-longest // LANES) * LANES, dtype=torch.uint8, device=device)
    lane = torch.arange(LANES, device=device)
    shortest = int(batch.symbols.min())
    for first in range(0, longest, LANES):
        entry = entries[offset + (state & _MASK)]
        rows[:, first : first + LANES] = entry >> 24
        grown = (((entry >> PRECISION) & _MASK) + 1) * (state >> PRECISION) + (entry & _MASK)
        needed = grown < LOWEST_STATE
        if first + LANES > shortest:
            active = first + lane < symbols
            needed &= active
            grown = torch.where(active, grown, state)
        used = needed.cumsum(1)
        word = words[(position[:, None] + used - 1).clamp_(0, len(words) - 1)]
        state = torch.where(needed, (grown << 16) | word, grown)
        position = position + used[:, -1]
    torch.masked_select(rows, torch.arange(rows.shape[1], device=device) < symbols, out=out)
    return (position == end) & (state == LOWEST_STATE).all(1)
