"""Checks and normal form of what the user passes to a linear-head loss: flat rows, one dtype, one implementation."""

import logging
import os
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from litropy.kernels.linear_head_types import Head

__all__ = ["HeadInputs", "Impl", "prepare", "resolve_impl"]

Impl = Literal["auto", "triton", "torch"]
_log = logging.getLogger("litropy")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class HeadInputs:
    """N flat rows for the kernels."""

    input: Tensor  # [N, D]
    head: Head
    target: Tensor | None  # [N], negative: ignored


@cache
def _log_once(message: str) -> None:
    _log.info(message)


def resolve_impl(impl: Impl, input: Tensor) -> Literal["triton", "torch"]:
    """Choose the implementation: Triton on a GPU, PyTorch on a CPU and for float64."""
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"`impl` is {impl!r}; choose 'auto', 'triton' or 'torch'.")
    on_gpu = input.device.type == "cuda"
    if impl == "auto":
        chosen: Literal["triton", "torch"] = "triton" if on_gpu and input.dtype != torch.float64 else "torch"
        if not torch.compiler.is_compiling():
            _log_once(f"linear head: {chosen} implementation on {input.device.type}")
        return chosen
    if impl == "triton":
        if input.dtype == torch.float64:
            raise ValueError("`impl='triton'` computes in float32; float64 inputs need impl='torch' or 'auto'.")
        if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"`impl='triton'` needs a GPU, but `input` is on {input.device.type}. Use impl='auto', or set"
                " TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter (slow, for tests)."
            )
    return impl


def prepare(
    input: Tensor,
    weight: Tensor,
    target: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float | Tensor,
) -> HeadInputs:
    """Check shapes, dtypes and options, cast under autocast, and flatten the rows.

    Raises:
        ValueError: naming what does not fit and what would.
    """
    if weight.ndim != 2 or not input.ndim or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"`input` {tuple(input.shape)} and `linear_weight` {tuple(weight.shape)} do not fit: they must be"
            " [..., D] and [V, D]."
        )
    if not weight.shape[0]:
        raise ValueError("`linear_weight` has no rows: is it a shard that was not gathered (ZeRO-3, FSDP)?")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"`linear_bias` is {tuple(bias.shape)}; it must be [V] = {tuple(weight.shape[:1])}.")
    device = input.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, weight = input.to(dtype), weight.to(dtype)
    if input.dtype != weight.dtype or input.dtype not in _DTYPES:
        raise ValueError(
            f"`input` is {input.dtype} and `linear_weight` is {weight.dtype}; both must be the same one of float32,"
            " bfloat16, float16 and float64. Cast one, or use torch.autocast."
        )
    if bias is not None:
        bias = bias.to(weight.dtype)
    if target is not None:
        if target.dtype != torch.int64:
            raise ValueError(f"`target` is {target.dtype}; token ids must be int64: use target.long().")
        if target.shape != input.shape[:-1]:
            raise ValueError(
                f"`target` is {tuple(target.shape)}; it must be input.shape[:-1] = {tuple(input.shape[:-1])}."
            )
        target = target.reshape(-1)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"`softcap` is {softcap}; it must be positive, or None for no softcap.")
    inv_temperature, row_inv_temperature = _inverse(temperature, input.shape[:-1])
    head = Head(weight, bias, inv_temperature, row_inv_temperature, float(softcap or 0.0))
    return HeadInputs(input.reshape(-1, input.shape[-1]), head, target)


def _inverse(temperature: float | Tensor, shape: torch.Size) -> tuple[float, Tensor | None]:
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(f"`temperature` is {temperature}; it must be positive.")
        return 1.0 / temperature, None
    if temperature.requires_grad:
        raise ValueError("`temperature` requires a gradient, but none flows to it; pass temperature.detach().")
    if temperature.shape != shape and temperature.ndim:
        raise ValueError(
            f"`temperature` is {tuple(temperature.shape)}; it must be a number or one value a row, {tuple(shape)}."
        )
    return 1.0, temperature.reciprocal().expand(shape).reshape(-1)
