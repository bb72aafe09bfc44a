"""Triton kernel that puts byte planes together to words, in one pass.

Shape key: n words.
"""

import triton
import triton.language as tl

__all__ = ["merge_kernel"]

# of ``tensor_codec_planes``
_ROTATE, _ZIGZAG = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def merge_kernel(
    planes_ptr, others_ptr, merged_ptr, n,
    PLANES: tl.constexpr, KIND: tl.constexpr, HAS_BASE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Planes [PLANES, n], most significant first, to unsigned words [n]; a base [n] is added to differences."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    r = tl.zeros((BLOCK,), dtype=merged_ptr.dtype.element_ty)
    for k in tl.static_range(PLANES):
        byte = tl.load(planes_ptr + k * n + i, mask=mask, other=0).to(r.dtype)
        r = byte if PLANES == 1 else (r << 8) | byte
    if KIND == _ROTATE:
        r = (r >> 1) | (r << (8 * PLANES - 1))
    if KIND == _ZIGZAG:
        r = (r >> 1) ^ (0 - (r & 1))
        if HAS_BASE:
            r += tl.load(others_ptr + i, mask=mask, other=0)
    tl.store(merged_ptr + i, r, mask=mask)
