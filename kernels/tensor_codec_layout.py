"""What a coded tensor is: its layout, the plan it was coded by, and its chunks.

A tensor is flattened (row-major) and cut into chunks of ``chunk_elements``; each is coded by itself, so that slices and
several threads need not wait for the rest. Layout, base and payloads are all that decoding takes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "CHUNK_BYTES", "DTYPES", "SEGMENT", "Base", "Buffer", "Codec", "Coder", "EncodedTensor", "Impl", "TensorLayout",
    "TensorPlan", "flat_chunk", "room_bytes",
]  # fmt: skip

# bytes of a tensor that a chunk holds unless told otherwise: large enough for its tables not to count
CHUNK_BYTES = 2 << 20
# symbols that share one set of 32 rANS states; chunks are whole multiples
SEGMENT = 32768
_MOST_CHUNK_BYTES = 1 << 30
_NAMES = (
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "bfloat16", "float16", "float32",
    "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
    "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2",
)  # fmt: skip
# what can be coded, by the names that files store; all in little-endian order
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES}

Buffer: TypeAlias = bytes | bytearray | memoryview
Codec = Literal["auto", "zstd", "rans", "raw"]
Coder = Literal["raw", "huffman", "zstd", "zstd_match", "groups", "rans"]
Impl = Literal["auto", "numba", "torch", "triton"]
# a whole tensor, or what gives the chunk of an index
Base: TypeAlias = Tensor | Callable[[int], Tensor] | None


def room_bytes(nbytes: int) -> int:
    """The room to code so many bytes in: while a part of them is coded, it may be larger than it was."""
    return nbytes + nbytes // 4096 + (1 << 18)


@dataclass(frozen=True)
class TensorLayout:
    """What decoding needs to know of a tensor beside its payloads.

    Attributes:
        dtype: one of ``DTYPES``.
        shape: of the tensor.
        delta: whether the payloads hold differences from a base of the same dtype and shape.
        chunk_elements: elements of a chunk, the last one excepted: a positive multiple of 32,768.

    Raises:
        ValueError: when a field is none of these, or a chunk would be larger than 1 GiB.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    delta: bool
    chunk_elements: int

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES.values():
            raise ValueError(f"Tensors of {self.dtype} cannot be coded. Convert to one of {', '.join(DTYPES)}.")
        if any(size < 0 for size in self.shape) or prod(self.shape) * self.dtype.itemsize >= 1 << 63:
            raise ValueError(f"The shape {self.shape} is none a tensor can have: sizes count from 0, bytes to 2^63.")
        if self.chunk_elements < 1 or self.chunk_elements % SEGMENT:
            raise ValueError(f"`chunk_elements` must be a positive multiple of {SEGMENT}, got {self.chunk_elements}.")
        if self.chunk_elements * self.dtype.itemsize > _MOST_CHUNK_BYTES:
            raise ValueError(
                f"`chunk_elements` = {self.chunk_elements} makes chunks of {self.chunk_elements * self.dtype.itemsize} "
                f"bytes. At most {_MOST_CHUNK_BYTES} are allowed."
            )

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.numel * self.dtype.itemsize

    @property
    def num_chunks(self) -> int:
        """Chunks of the tensor; an empty one has none."""
        return -(-self.numel // self.chunk_elements)

    def chunk_range(self, index: int) -> tuple[int, int]:
        """Where a chunk starts and stops among the elements of the flattened tensor.

        Raises:
            ValueError: when there is no such chunk.

        Example:
            >>> TensorLayout(torch.float32, (3, 20_000), False, 32768).chunk_range(1)
            (32768, 60000)
        """
        if not 0 <= index < self.num_chunks:
            raise ValueError(f"There is no chunk {index}: a tensor of shape {self.shape} has {self.num_chunks} here.")
        start = index * self.chunk_elements
        return start, min(start + self.chunk_elements, self.numel)

    def max_payload_bytes(self, index: int) -> int:
        """The most bytes that a chunk's payload can have: those of its elements, and one."""
        start, stop = self.chunk_range(index)
        return (stop - start) * self.dtype.itemsize + 1


@dataclass(frozen=True)
class TensorPlan:
    """How a tensor is coded: its layout, and a coder for each byte of a word.

    Attributes:
        layout: what decoding needs.
        codec: "rans" where any plane takes it, else "zstd" where any does, else "raw".
        coders: of the byte planes, most significant first; empty for "raw".
        estimated_bytes: of all payloads, from a sample of the tensor.
    """

    layout: TensorLayout
    codec: Codec
    coders: tuple[Coder, ...]
    estimated_bytes: int


@dataclass(frozen=True)
class EncodedTensor:
    """A tensor in coded chunks.

    Attributes:
        layout: what decoding needs.
        codec: "zstd", "rans" or "raw": what was chosen.
        chunks: one payload each.
    """

    layout: TensorLayout
    codec: Codec
    chunks: tuple[Buffer, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all payloads."""
        return sum(map(len, self.chunks))

    def __reduce__(self) -> tuple[Any, ...]:
        """Payloads may be views of one block of memory, which cannot be pickled."""
        return EncodedTensor, (self.layout, self.codec, tuple(map(bytes, self.chunks)))


def flat_chunk(tensor: Tensor, layout: TensorLayout, index: int) -> Tensor:
    """Elements of a chunk, on a CPU: a view where the tensor is contiguous there, else a copy of this chunk alone.

    Args:
        tensor: of the layout's dtype and shape, with any strides, on any device.
        layout: of the tensor.
        index: of the chunk.

    Returns:
        The elements [n], contiguous.

    Raises:
        ValueError: when the tensor is not of this dtype or shape, or there is no such chunk.

    Example:
        >>> flat_chunk(torch.arange(6).view(2, 3).T, TensorLayout(torch.int64, (3, 2), False, 32768), 0)
        tensor([0, 3, 1, 4, 2, 5])
    """
    if (tensor.dtype, tuple(tensor.shape)) != (layout.dtype, layout.shape):
        raise ValueError(
            f"Expected a tensor of {layout.dtype} and shape {layout.shape}, "
            f"got {tensor.dtype} and {tuple(tensor.shape)}."
        )
    tensor = tensor.detach().resolve_conj().resolve_neg()
    pieces = _flat_pieces(tensor, *layout.chunk_range(index))
    return (pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces)).cpu()


def _flat_pieces(x: Tensor, start: int, stop: int) -> list[Tensor]:
    """Elements start to stop of a flattened tensor in pieces, none of which copies more than it holds."""
    if x.is_contiguous():
        return [x.view(-1)[start:stop]]
    if x.ndim == 1:
        return [x[start:stop]]
    row = x[0].numel()
    first, last = start // row, (stop - 1) // row
    if first == last:
        return _flat_pieces(x[first], start - first * row, stop - first * row)
    head = _flat_pieces(x[first], start - first * row, row)
    tail = _flat_pieces(x[last], 0, stop - last * row)
    return [*head, x[first + 1 : last].reshape(-1), *tail]
