"""Chunks of what differences are taken from: a whole tensor, or what gives its chunks."""

from torch import Tensor

from litropy.kernels.tensor_codec_layout import Base, TensorLayout, TensorPlan, flat_chunk

__all__ = ["base_chunk", "fitting_base", "plan_base"]


def base_chunk(base: Base, layout: TensorLayout, index: int) -> Tensor | None:
    """A chunk of the base."""
    chunk = flat_chunk(base, layout, index) if isinstance(base, Tensor) else base and base(index)
    start, stop = layout.chunk_range(index)
    return fitting_base(chunk, layout, stop - start)


def plan_base(base: Base, plan: TensorPlan, index: int) -> Tensor | None:
    """A chunk of the base, if the plan needs it."""
    return base_chunk(base, plan.layout, index) if plan.coders else None


def fitting_base(base: Tensor | None, layout: TensorLayout, length: int) -> Tensor | None:
    """A base's chunk, on a CPU; it must be there if and only if the layout says so."""
    if (base is not None) != layout.delta:
        needed = "with a base: give the same one" if layout.delta else "without a base: give none"
        raise ValueError(f"The tensor was coded {needed}.")
    if base is None:
        return None
    if base.dtype != layout.dtype or base.shape != (length,):
        raise ValueError(
            f"A chunk of the base has {base.dtype} and shape {tuple(base.shape)}, the tensor's {layout.dtype} and "
            f"{(length,)}."
        )
    return base.detach().cpu().contiguous()
