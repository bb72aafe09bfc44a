"""All statistics of blocks of whole rows with Triton, for those that compare the logits of a row.

Shape key: N rows, D width, V vocabulary; n is the number of rows in a block.
"""

import torch
import triton
from torch import Tensor

from litropy.kernels.linear_head_ranking_kernels import ranking_kernel
from litropy.kernels.linear_head_sums import finish_sums
from litropy.kernels.linear_head_tiles import logit_elements, ranges
from litropy.kernels.linear_head_triton import collect_sums, sums_wanted
from litropy.kernels.linear_head_types import Head, RowStats, Want

__all__ = ["ranked_statistics"]

_BLOCK_V = 2048


def ranked_statistics(input: Tensor, head: Head, target: Tensor | None, want: Want, budget: int) -> RowStats:
    """Compute all statistics of every row of ``input`` [N, D], from float32 logits within ``budget`` bytes."""
    N, V = input.shape[0], head.weight.shape[0]
    stats = RowStats.zeros(N, input, torch.float32, target is not None, want)
    for rows in ranges(N, max(1, logit_elements(torch.float32, budget) // V)):
        found = _block(input[rows], head.of_rows(rows), None if target is None else target[rows], want)
        if target is not None:
            found.zero_where(target[rows] < 0)
        stats.put(rows, found)
    return stats


def _block(hidden: Tensor, head: Head, target: Tensor | None, want: Want) -> RowStats:
    logits = _exact_logits(hidden, head)
    n, V = logits.shape
    fields = torch.zeros((8, n), dtype=torch.float32, device=logits.device)
    argmax, rank = torch.empty((2, n), dtype=torch.int64, device=logits.device)
    top_k, nucleus = fields.new_empty((2, n)), fields.new_empty((3, n))
    ranking_kernel[(n,)](
        logits, head.mean_weight, target, head.row_inv_temperature, fields, argmax, rank, top_k, nucleus,
        V, logits.stride(0), n, head.softcap, head.inv_temperature, min(want.top_k, V), want.top_p,
        HAS_C=head.mean_weight is not None, HAS_SOFTCAP=bool(head.softcap),
        HAS_SCALE=head.row_inv_temperature is not None, HAS_TARGET=target is not None, **sums_wanted(want),
        WANT_TOP_K=want.top_k > 0, WANT_TOP_P=want.top_p > 0, OPEN=want.open_nucleus,
        BLOCK_V=min(_BLOCK_V, triton.next_power_of_2(V)), num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    sums = collect_sums(fields, argmax, target, V, want)
    found = finish_sums(sums, target, 1.0 if head.mean_total is None else head.mean_total, want)
    found.rank, (found.topk_entropy, found.topk_mass) = rank, top_k
    found.nucleus_entropy, found.nucleus_boundary, found.nucleus_log_mass = nucleus
    return found


def _exact_logits(hidden: Tensor, head: Head) -> Tensor:
    """Raw logits [n, V] in float32: rounded to a half they would tie, and a nucleus would take all of its ties in."""
    logits = torch.zeros((), device=hidden.device)
    for part, matrix in head.factors():
        a, b = hidden[:, part], matrix.t()
        if a.dtype == torch.float32:
            product = torch.mm(a, b)
        elif a.device.type == "cuda":
            product = torch.mm(a, b, out_dtype=torch.float32)
        else:  # the interpreter's device has no such product
            product = torch.mm(a.float(), b.float())
        logits = product if logits.ndim == 0 else logits.add_(product)
    return logits if head.bias is None else logits.add_(head.bias.float())
