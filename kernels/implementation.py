"""Which implementation of an operator runs."""

import os
from typing import Literal

import torch

__all__ = ["Impl", "resolve_impl"]

Impl = Literal["auto", "triton", "torch"]


def resolve_impl(
    impl: Impl, device: torch.device, dtype: torch.dtype, operand: str = "input"
) -> Literal["triton", "torch"]:
    """Choose the implementation: Triton on a GPU, PyTorch on a CPU and for float64.

    Args:
        impl: what the user asks for.
        device: where the operands are.
        dtype: of the products.
        operand: the user's name of the first operand, for errors.

    Raises:
        ValueError: if there is no such implementation, or it cannot run here.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"`impl` is {impl!r}; choose 'auto', 'triton' or 'torch'.")
    on_gpu = device.type == "cuda"
    if impl == "auto":
        return "triton" if on_gpu and dtype != torch.float64 else "torch"
    if impl == "triton" and dtype == torch.float64:
        raise ValueError("`impl='triton'` computes in float32; float64 inputs need impl='torch' or 'auto'.")
    if impl == "triton" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"`impl='triton'` needs a GPU, but `{operand}` is on {device.type}. Use impl='auto', or set"
            " TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter (slow, for tests)."
        )
    return impl
