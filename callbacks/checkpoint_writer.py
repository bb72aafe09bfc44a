"""Write tensors, one chunk at a time, into a compressed file."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor, nn

from litropy.callbacks.checkpoint_atomic import atomic_write
from litropy.callbacks.checkpoint_header import Region, parse_header, render_header
from litropy.callbacks.checkpoint_reader import CheckpointFile
from litropy.callbacks.checkpoint_record import SMALL_BYTES, head_bytes, most_bytes, render_head, tensor_bytes
from litropy.kernels.host_memory import Rooms
from litropy.kernels.in_order import in_order
from litropy.kernels.tensor_codec import TensorPlan, encode_chunk_into, flat_chunk, plan_tensor
from litropy.kernels.tensor_codec_base import plan_base
from litropy.kernels.tensor_codec_layout import Codec, room_bytes

__all__ = ["Written", "write_checkpoint"]

_Digits = "0" * 16


@dataclass(frozen=True)
class Written:
    """What a save made.

    Args:
        digest: names the content of the file; deltas against it carry it.
        tensor_bytes: bytes of the tensors, each storage counted once.
        file_bytes: bytes of the file.
        deltas: how many tensors are coded against the base.
    """

    digest: str
    tensor_bytes: int
    file_bytes: int
    deltas: int


@dataclass(frozen=True)
class _Planned:
    tensor: Tensor
    plan: TensorPlan
    base: Callable[[int], Tensor] | None


@dataclass(frozen=True)
class _Coded:
    values: Tensor
    room: NDArray[np.uint8]
    payload: memoryview
    checksum: int


def write_checkpoint(
    tensors: Mapping[str, Tensor],
    path: Path,
    *,
    state: Any = None,
    codec: Codec = "auto",
    base: CheckpointFile | None = None,
    threads: int = 1,
    progress: Callable[[int], None] | None = None,
    before_rename: Callable[[], None] | None = None,
) -> Written:
    """Write tensors and state, whole or not at all; ``threads`` + 2 chunks are held at most, coded and not.

    Args:
        tensors: of any device, strides and sharing; a tensor that is the same view as another is stored once.
        path: the file.
        state: JSON to keep beside them.
        codec: how to code; auto takes the smaller for each tensor.
        base: an open file to code differences against, where those are smaller.
        threads: how many chunks to encode at the same time, of several tensors where one has too few.
        progress: is told the bytes of each chunk that is done.
        before_rename: is called when everything is written, just before the file takes its name.

    Raises:
        ValueError: naming a tensor that cannot be stored.
        OSError: if the file cannot be written.
    """
    names, aliases = _shared(tensors)
    planned = {name: _plan(name, tensors[name], codec, base) for name in names}
    pieces = ((plan, index) for plan in planned.values() for index in range(plan.plan.layout.num_chunks))
    deltas = sum(plan.base is not None for plan in planned.values())
    metadata = {"litropy_state": json.dumps(state, separators=(",", ":")), "litropy_aliases": json.dumps(aliases)}
    if deltas:
        assert base is not None
        metadata["litropy_base"] = base.digest
    room = _most_header_bytes(planned, metadata)
    regions: dict[str, Region] = {}
    checksums: dict[str, str] = {}
    rooms = Rooms()
    with atomic_write(path) as file, closing(in_order(partial(_encode, rooms), pieces, threads, _is_small)) as coded:
        file.seek(room)
        for name, plan in planned.items():
            start = file.tell() - room
            try:
                checksums[name] = _write_tensor(file, plan, coded, rooms, progress)
            except ValueError as error:
                raise ValueError(f"Tensor {name!r} cannot be stored: {error}") from error
            regions[name] = Region(start, file.tell() - room, plan.tensor.dim())
        file_bytes = file.tell()
        header = render_header(regions, {**metadata, "litropy_heads": json.dumps(checksums)}, room)
        file.seek(0)
        file.write(header)
        if before_rename is not None:
            file.flush()
            before_rename()
    digest = parse_header(header[8:], file_bytes - room).digest
    return Written(digest, sum(plan.plan.layout.nbytes for plan in planned.values()), file_bytes, deltas)


def _shared(tensors: Mapping[str, Tensor]) -> tuple[list[str], dict[str, str]]:
    """Which tensors to store, and which names mean a tensor that is stored under another name."""
    first: dict[Any, str] = {}
    names: list[str] = []
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or name == "__metadata__":
            raise ValueError(
                f"{name!r} is a {type(tensor).__name__}: only tensors are stored, and not as `__metadata__`."
            )
        if tensor.layout != torch.strided or tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            kind = (
                "on the meta device, without values"
                if tensor.is_meta
                else f"a {type(tensor).__name__} ({tensor.layout})"
            )
            raise ValueError(
                f"Tensor {name!r} is {kind}. Only plain, dense tensors with values are stored: gather shards with"
                " `full_tensor()`, and materialise or leave out the others."
            )
        view = (
            tensor.device, tensor.dtype, tensor.untyped_storage().data_ptr(), tensor.storage_offset(),
            tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg(),
        )  # fmt: skip
        known = first.setdefault(view, name) if tensor.numel() else name
        if known == name:
            names.append(name)
        else:
            aliases[name] = known
    return names, aliases


def _plan(name: str, tensor: Tensor, codec: Codec, base: CheckpointFile | None) -> _Planned:
    try:
        alone = plan_tensor(tensor, codec=codec)
        if base is not None and tensor.numel() and base.same_layout(name, alone.layout):

            def chunk(index: int) -> Tensor:
                return base.chunk(name, index)

            delta = plan_tensor(tensor, codec=codec, base=chunk)
            if delta.estimated_bytes < alone.estimated_bytes:
                return _Planned(tensor, delta, chunk)
    except ValueError as error:
        raise ValueError(f"Tensor {name!r} cannot be stored: {error}") from error
    return _Planned(tensor, alone, None)


def _is_small(piece: tuple[_Planned, int]) -> bool:
    return piece[0].plan.layout.nbytes <= SMALL_BYTES


def _encode(rooms: Rooms, piece: tuple[_Planned, int]) -> _Coded:
    planned, index = piece
    values = flat_chunk(planned.tensor, planned.plan.layout, index)
    room = rooms.take(room_bytes(values.nbytes))
    size = encode_chunk_into(values, planned.plan, room, base=plan_base(planned.base, planned.plan, index))
    payload = room[:size].data
    return _Coded(values, room, payload, xxhash.xxh3_64_intdigest(payload))


def _write_tensor(
    file: IO[bytes],
    planned: _Planned,
    coded: Iterator[_Coded],
    rooms: Rooms,
    progress: Callable[[int], None] | None,
) -> str:
    """Take a tensor's chunks from what is coded, in order, and write them; the checksum of its head."""
    layout = planned.plan.layout
    start, room = file.tell(), head_bytes(layout)
    lengths: list[int] = []
    checksums: list[int] = []
    digest = xxhash.xxh3_128()
    file.seek(start + room)
    for index, chunk in enumerate(islice(coded, layout.num_chunks)):
        first, last = layout.chunk_range(index)
        digest.update(tensor_bytes(chunk.values))
        file.write(chunk.payload)
        lengths.append(len(chunk.payload))
        checksums.append(chunk.checksum)
        rooms.give(chunk.room)
        if progress is not None:
            progress((last - first) * layout.dtype.itemsize)
    end = file.tell()
    head = render_head(layout, digest.digest(), lengths, checksums)
    file.seek(start)
    file.write(head)
    file.seek(end)
    return head[-8:].hex()


def _most_header_bytes(planned: Mapping[str, _Planned], metadata: Mapping[str, str]) -> int:
    total = sum(most_bytes(plan.plan.layout) for plan in planned.values())
    regions = {name: Region(0, total, plan.tensor.dim()) for name, plan in planned.items()}
    # offsets have at most the digits of the last one
    regions = {name: Region(total, 2 * total, region.rank) for name, region in regions.items()}
    return len(render_header(regions, {**metadata, "litropy_heads": json.dumps(dict.fromkeys(planned, _Digits))}))
