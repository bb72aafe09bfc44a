"""One encoded tensor as a run of bytes that says everything about itself: head, index of chunks, chunks."""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from litropy.kernels.tensor_codec import DTYPES, TensorLayout, decode_chunks

__all__ = [
    "SMALL_BYTES",
    "ReadBytes",
    "Record",
    "decode_record",
    "head_bytes",
    "most_bytes",
    "read_record",
    "render_head",
    "tensor_bytes",
]

ReadBytes = Callable[[int, int], bytes]  # offset within the record, length

# magic, version, rank, delta, dtype, elements in a chunk, digest of the decoded bytes
_FIXED = struct.Struct("<4sHBB16sQ16s")
_MAGIC, _VERSION = b"LTRP", 1
_INDEX = np.dtype([("length", "<u4"), ("checksum", "<u8")])
_CHECKSUM_BYTES = 8
_MOST_CHUNK_BYTES = 64 * 2**20  # what a reader may have to hold
SMALL_BYTES = 1 << 16  # tensors up to here take less time than to hand them over to another thread
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Record:
    """The head of an encoded tensor: its layout, where its chunks lie, and what they must hash to."""

    layout: TensorLayout
    digest: bytes
    head_checksum: str
    lengths: tuple[int, ...]
    checksums: tuple[int, ...]
    starts: tuple[int, ...]

    def payload(self, read: ReadBytes, index: int) -> bytes:
        """Read a chunk and check it.

        Raises:
            ValueError: if the chunk is not what was written.
        """
        payload = read(self.starts[index], self.lengths[index])
        if xxhash.xxh3_64_intdigest(payload) != self.checksums[index]:
            raise ValueError(f"the checksum of chunk {index} is wrong: it is damaged")
        return payload

    def payloads(self, read: ReadBytes, chunks: range | None = None) -> Iterator[bytes]:
        """Read and check chunks, in order; None takes all."""
        for index in range(len(self.lengths)) if chunks is None else chunks:
            yield self.payload(read, index)


def head_bytes(layout: TensorLayout) -> int:
    """How many bytes precede the first chunk."""
    return _FIXED.size + 8 * len(layout.shape) + _INDEX.itemsize * layout.num_chunks + _CHECKSUM_BYTES


def most_bytes(layout: TensorLayout) -> int:
    """The most bytes that an encoded tensor can take."""
    return head_bytes(layout) + layout.nbytes + layout.num_chunks


def render_head(layout: TensorLayout, digest: bytes, lengths: list[int], checksums: list[int]) -> bytes:
    """Write the bytes that precede the chunks."""
    fixed = _FIXED.pack(
        _MAGIC, _VERSION, len(layout.shape), layout.delta, _NAMES[layout.dtype].encode(), layout.chunk_elements, digest
    )
    index = np.zeros(len(lengths), _INDEX)
    index["length"], index["checksum"] = lengths, checksums
    head = fixed + struct.pack(f"<{len(layout.shape)}Q", *layout.shape) + index.tobytes()
    return head + xxhash.xxh3_64_digest(head)


def read_record(read: ReadBytes, nbytes: int) -> Record:
    """Read and check the head of an encoded tensor.

    Args:
        read: gives bytes of the record.
        nbytes: how many bytes the record has.

    Raises:
        ValueError: if the head is damaged, or promises what ``nbytes`` cannot hold; nothing large is read before.
    """
    if nbytes < _FIXED.size + _CHECKSUM_BYTES:
        raise ValueError(f"{nbytes} bytes are too few for an encoded tensor")
    magic, version, rank, delta, dtype_name, chunk_elements, digest = _FIXED.unpack(read(0, _FIXED.size))
    dtype = DTYPES.get(dtype_name.rstrip(b"\0").decode("ascii", "replace"))
    if magic != _MAGIC or version != _VERSION or dtype is None or delta > 1:
        raise ValueError("it does not start as an encoded tensor of this version does")
    if nbytes < _FIXED.size + 8 * rank + _CHECKSUM_BYTES:
        raise ValueError(f"{nbytes} bytes are too few for {rank} dimensions")
    if chunk_elements * dtype.itemsize > _MOST_CHUNK_BYTES:
        raise ValueError(f"a chunk of {chunk_elements} elements is over {_MOST_CHUNK_BYTES} bytes")
    shape = struct.unpack(f"<{rank}Q", read(_FIXED.size, 8 * rank))
    layout = TensorLayout(dtype, shape, bool(delta), chunk_elements)
    length = head_bytes(layout)
    if length > nbytes:
        raise ValueError(f"shape {list(shape)} takes an index of {length} bytes, but there are {nbytes}")
    head = read(0, length)
    if xxhash.xxh3_64_digest(head[:-_CHECKSUM_BYTES]) != head[-_CHECKSUM_BYTES:]:
        raise ValueError("the checksum of its head is wrong: it is damaged")
    index = np.frombuffer(head, _INDEX, layout.num_chunks, _FIXED.size + 8 * rank)
    lengths = tuple(index["length"].tolist())
    for chunk, size in enumerate(lengths):
        if not 0 < size <= layout.max_payload_bytes(chunk):
            raise ValueError(f"chunk {chunk} of {size} bytes cannot be right")
    ends = np.cumsum(index["length"], dtype=np.int64) + length
    if (int(ends[-1]) if len(ends) else length) != nbytes:
        raise ValueError(f"its chunks end at byte {int(ends[-1]) if len(ends) else length} of {nbytes}")
    starts = tuple((ends - index["length"]).tolist())
    return Record(layout, digest, head[-_CHECKSUM_BYTES:].hex(), lengths, tuple(index["checksum"].tolist()), starts)


def decode_record(payload: Tensor) -> Tensor:
    """Decode a tensor from its record alone, on the device where the record is.

    Args:
        payload: uint8, of any shape: a tensor of a compressed file as another reader gives it.

    Returns:
        The tensor, on the same device.

    Raises:
        ValueError: if that is no record, or a damaged one, or one that holds only a difference.
    """
    if payload.dtype != torch.uint8:
        raise ValueError(f"it is {payload.dtype}, but encoded tensors are torch.uint8")
    data = payload.detach().reshape(-1).cpu().numpy()

    def read(offset: int, length: int) -> bytes:
        return data[offset : offset + length].tobytes()

    record = read_record(read, data.size)
    if record.layout.delta:
        raise ValueError("it is a difference, and its base is not known here")
    tensor = decode_chunks(record.payloads(read), record.layout, device=payload.device)
    if tensor.device.type == "cpu" and xxhash.xxh3_128_digest(tensor_bytes(tensor.reshape(-1))) != record.digest:
        raise ValueError("the checksum of its values is wrong")
    return tensor


def tensor_bytes(values: Tensor) -> Any:
    """The bytes of a 1-D contiguous tensor on a CPU, without a copy."""
    return values.view(torch.uint8).numpy()
