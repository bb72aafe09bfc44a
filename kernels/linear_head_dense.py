"""Row statistics from blocks of whole rows of logits, for statistics that compare the logits of a row.

Shape key: N rows, D width, V vocabulary; n is the number of rows in a block.
"""

from torch import Tensor

from litropy.kernels.linear_head_ranking import quick_nucleus, rank_rows
from litropy.kernels.linear_head_sums import Sums, finish_sums, reduce_sums
from litropy.kernels.linear_head_tiles import Rows, Workspace, cached_parts, final_logits_, raw_logits, tile_shape
from litropy.kernels.linear_head_torch import add_tile
from litropy.kernels.linear_head_types import Head, RowStats, Want
from litropy.kernels.vocab_parallel import Shard, resolve_group

__all__ = ["dense_statistics"]

# rows of a block where the ranks of a group must take the same ones, whatever their shards' sizes
_GROUP_ROWS = 16


def dense_statistics(
    input: Tensor, head: Head, target: Tensor | None, want: Want, shard: Shard, budget: int
) -> RowStats:
    """Compute all statistics of every row of ``input`` [N, D] from one product a block."""
    N, V = input.shape[0], head.weight.shape[0]
    group = resolve_group(shard.group)
    rows = Rows.of(input, target)
    n_max, _ = tile_shape(rows, head, budget, V)
    if group is not None:
        n_max = _GROUP_ROWS
    work = Workspace(head, n_max, V, budget, whole=group is not None)
    stats = RowStats.zeros(N, input, head.stats_dtype, target is not None, want)
    mean_total = 1.0 if head.mean_total is None else head.mean_total
    # the nuclei of all rows of a block at a time, whose final logits stay where they are
    later = bool(want.top_p) and group is None and not work.is_half and input.device.type == "cpu" and V > 0
    ranked = want._replace(top_p=0.0) if later else want
    for index, hidden, block_target in rows.blocks(n_max):
        tile = raw_logits(hidden, head, slice(0, V), work)
        block, block_head = stats.of_rows(index), head.of_rows(index)
        for part, z, u, e, _ in cached_parts(tile, work):
            part_target = None if block_target is None else block_target[part]
            final_logits_(z, block_head.of_rows(part))
            sums = Sums.start((z.shape[0],), input, head.stats_dtype, target is not None, want)
            if V:
                add_tile(sums, slice(None), z, u, e, 0, head, part_target)
            if group is not None:
                assert shard.offset is not None
                seen = 1.0 if head.mean_weight is None else head.mean_weight.sum()
                reduce_sums(sums, group, seen, shard.offset)
            found = finish_sums(sums, part_target, mean_total, want)
            rank_rows(z, part_target, sums.z_target, found, ranked, group)
            if part_target is not None:
                found.zero_where(part_target < 0)
            block.put(part, found)
        if later:
            quick_nucleus(tile, block, want)
            if block_target is not None:
                block.zero_where(block_target < 0)
        stats.put(index, block)
    return stats
