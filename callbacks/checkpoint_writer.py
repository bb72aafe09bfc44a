"""Write tensors, one chunk at a time, into a compressed file."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from torch import Tensor, nn

from litropy.callbacks.checkpoint_atomic import atomic_write
from litropy.callbacks.checkpoint_header import Region, parse_header, render_header
from litropy.callbacks.checkpoint_reader import CheckpointFile
from litropy.callbacks.checkpoint_record import head_bytes, most_bytes, render_head, tensor_bytes
from litropy.kernels.tensor_codec import TensorPlan, encode_chunks, flat_chunk, plan_tensor
from litropy.kernels.tensor_codec_layout import Codec

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
    """Write tensors and state, whole or not at all; peak memory is a few chunks.

    Args:
        tensors: of any device, strides and sharing; a tensor that is the same view as another is stored once.
        path: the file.
        state: JSON to keep beside them.
        codec: how to code; auto takes the smaller for each tensor.
        base: an open file to code differences against, where those are smaller.
        threads: how many chunks to encode at the same time.
        progress: is told the bytes of each chunk that is done.
        before_rename: is called when everything is written, just before the file takes its name.

    Raises:
        ValueError: naming a tensor that cannot be stored.
        OSError: if the file cannot be written.
    """
    names, aliases = _shared(tensors)
    planned = {name: _plan(name, tensors[name], codec, base) for name in names}
    deltas = sum(plan.base is not None for plan in planned.values())
    metadata = {"litropy_state": json.dumps(state, separators=(",", ":")), "litropy_aliases": json.dumps(aliases)}
    if deltas:
        assert base is not None
        metadata["litropy_base"] = base.digest
    room = _most_header_bytes(planned, metadata)
    regions: dict[str, Region] = {}
    checksums: dict[str, str] = {}
    with atomic_write(path) as file:
        file.seek(room)
        for name, plan in planned.items():
            start = file.tell() - room
            try:
                checksums[name] = _write_tensor(file, plan, threads, progress)
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


def _write_tensor(file: IO[bytes], planned: _Planned, threads: int, progress: Callable[[int], None] | None) -> str:
    layout = planned.plan.layout
    start, room = file.tell(), head_bytes(layout)
    lengths: list[int] = []
    checksums: list[int] = []
    digest = xxhash.xxh3_128()
    file.seek(start + room)
    for index, payload in enumerate(encode_chunks(planned.tensor, planned.plan, base=planned.base, threads=threads)):
        first, last = layout.chunk_range(index)
        digest.update(tensor_bytes(flat_chunk(planned.tensor, layout, index)))
        file.write(payload)
        lengths.append(len(payload))
        checksums.append(xxhash.xxh3_64_intdigest(payload))
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
