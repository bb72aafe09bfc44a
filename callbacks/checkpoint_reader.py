"""Read a compressed file: whole, a tensor, or rows of one, and never more than is asked for."""

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash
from torch import Tensor

from litropy.callbacks.checkpoint_header import Header, read_header
from litropy.callbacks.checkpoint_record import SMALL_BYTES, Record, read_record, tensor_bytes
from litropy.kernels.host_memory import empty
from litropy.kernels.in_order import in_order
from litropy.kernels.tensor_codec import TensorLayout, decode_chunk, decode_chunks

__all__ = ["BASES", "CheckpointFile"]

BASES = "key_frames"  # folder beside the files, where what they are differences against is kept


class CheckpointFile:
    """An open compressed file; a context manager.

    Args:
        path: the file.
        base: the file that this one holds differences against; None looks for it in the folder ``key_frames`` beside.

    Raises:
        ValueError: if the file is damaged or no file of ours, naming the tensor.
        OSError: if there is no such file.
    """

    def __init__(
        self, path: str | os.PathLike[str], base: "str | os.PathLike[str] | CheckpointFile | None" = None
    ) -> None:
        self.path = Path(path)
        self._given_base = base
        self._base: CheckpointFile | None = None
        self._lock = threading.Lock()
        self._records: dict[str, Record] = {}
        self._file = open(self.path, "rb")  # noqa: SIM115
        try:
            self._header, self._heads, self._aliases, self._state = self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> tuple[Header, dict[str, str], dict[str, str], Any]:
        try:
            header = read_header(self._file, os.fstat(self._file.fileno()).st_size)
            heads, aliases, state = (
                json.loads(header.metadata.get(f"litropy_{key}", "null")) for key in ("heads", "aliases", "state")
            )
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path} cannot be read: {error}.") from error
        if not _are_strings(heads) or not _are_strings(aliases) or set(heads) != set(header.regions):
            raise ValueError(f"{self.path} cannot be read: its header contradicts itself.")
        wrong = {alias for alias, name in aliases.items() if name not in heads or alias in heads}
        if wrong:
            raise ValueError(f"{self.path}: tensor {min(wrong)!r} refers to one that is not there.")
        return header, heads, aliases, state

    def __enter__(self) -> "CheckpointFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, and its base if that was opened here."""
        self._file.close()
        if self._base is not None and self._base is not self._given_base:
            self._base.close()

    # what is in it

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return [*self._heads, *self._aliases]

    @property
    def state(self) -> Any:
        """The JSON beside the tensors, or None."""
        return self._state

    @property
    def digest(self) -> str:
        """What names the content of this file, 32 hexadecimal digits."""
        return self._header.digest

    @property
    def base_digest(self) -> str | None:
        """The digest of the file that this one holds differences against, or None."""
        return self._header.metadata.get("litropy_base")

    def layout(self, name: str) -> TensorLayout:
        """Dtype, shape and chunks of a tensor, without reading its values."""
        return self._record(name).layout

    def same_layout(self, name: str, layout: TensorLayout) -> bool:
        """Whether a tensor of that dtype, shape and chunks is stored here by itself, so that it can be a base."""
        return name in self._heads and self.layout(name) == layout

    def stored_bytes(self, name: str) -> int:
        """How many bytes of the file a tensor takes; 0 for another name of one that is stored."""
        if name in self._aliases:
            return 0
        region = self._header.regions[name]
        return region.stop - region.start

    # values

    def tensor(
        self,
        name: str,
        device: str | torch.device = "cpu",
        threads: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Read a tensor; contiguous, with memory of its own.

        Args:
            name: one of ``names``.
            device: where to decode.
            threads: how many chunks to decode at the same time.
            progress: is told the bytes of each chunk that is read.

        Raises:
            ValueError: if it is damaged, or its base is missing or another file.
        """
        record = self._record(name)
        layout = record.layout
        with self._naming(name):
            payloads = self._payloads(name, record, progress)
            base = self._base_chunk(name, layout) if layout.delta else None
            tensor = decode_chunks(payloads, layout, base=base, device=device, threads=threads)
            _check_values(tensor, record)
        return tensor

    def tensors(
        self,
        names: Iterable[str],
        device: str | torch.device = "cpu",
        threads: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Read tensors one after the other, as ``tensor`` does; on a CPU, threads need not wait for a small one's end.

        Args:
            names: of ``names``, in any order.
            device: where to decode.
            threads: how many chunks to decode at the same time; so many and one are ahead of the tensor that comes.
            progress: is told the bytes of each chunk that is read.

        Yields:
            Names and tensors.

        Raises:
            ValueError: if one is damaged, or its base is missing or another file.
        """
        if threads == 1 or torch.device(device).type != "cpu":
            for name in names:
                yield name, self.tensor(name, device, threads, progress)
            return

        def pieces() -> Iterator[tuple[str, Record, Tensor, int]]:
            for name in names:
                record = self._record(name)
                out = empty(record.layout.shape, record.layout.dtype)
                for index in range(max(record.layout.num_chunks, 1)):
                    yield name, record, out, index

        with closing(in_order(self._decode_piece, pieces(), threads, _is_small)) as decoded:
            for name, record, out, index in decoded:
                if record.layout.numel and progress is not None:
                    progress(_chunk_bytes(record.layout, index))
                if index + 1 >= record.layout.num_chunks:
                    with self._naming(name):
                        _check_values(out, record)
                    yield name, out

    def _decode_piece(self, piece: tuple[str, Record, Tensor, int]) -> tuple[str, Record, Tensor, int]:
        name, record, out, index = piece
        if record.layout.numel:
            start, stop = record.layout.chunk_range(index)
            self._decode_chunk(name, record, index, out.view(-1)[start:stop])
        return piece

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows ``start`` to ``stop`` of a tensor; only the chunks that hold them are read.

        Raises:
            ValueError: if there are no such rows, or they are damaged.
        """
        layout = self.layout(name)
        if not layout.shape or not 0 <= start <= stop <= layout.shape[0]:
            raise ValueError(
                f"{self.path}: tensor {name!r} of shape {list(layout.shape)} has no rows {start} to {stop}."
            )
        width = layout.numel // max(layout.shape[0], 1)
        first, last = start * width, stop * width
        out = torch.empty(last - first, dtype=layout.dtype)
        if last > first:
            for index in range(first // layout.chunk_elements, (last - 1) // layout.chunk_elements + 1):
                begin, end = layout.chunk_range(index)
                low, high = max(begin, first), min(end, last)
                out[low - first : high - first] = self.chunk(name, index)[low - begin : high - begin]
        return out.view(stop - start, *layout.shape[1:])

    def chunk(self, name: str, index: int) -> Tensor:
        """Decode one chunk, 1-D on a CPU."""
        return self._decode_chunk(name, self._record(name), index)

    def _decode_chunk(self, name: str, record: Record, index: int, out: Tensor | None = None) -> Tensor:
        with self._naming(name):
            payload = record.payload(self._reader(name), index)
            base = self._base_chunk(name, record.layout)(index) if record.layout.delta else None
            return decode_chunk(payload, record.layout, index, base=base, out=out)

    def _payloads(self, name: str, record: Record, progress: Callable[[int], None] | None) -> Iterator[bytes]:
        for index, payload in enumerate(record.payloads(self._reader(name))):
            yield payload
            if progress is not None:
                progress(_chunk_bytes(record.layout, index))

    def _record(self, name: str) -> Record:
        name = self._aliases.get(name, name)
        if name not in self._heads:
            raise ValueError(f"{self.path} has no tensor {name!r}.")
        if name not in self._records:
            with self._naming(name):
                region = self._header.regions[name]
                record = read_record(self._reader(name), region.stop - region.start)
                if record.head_checksum != self._heads[name] or len(record.layout.shape) != region.rank:
                    raise ValueError("another tensor lies in its place")
            self._records[name] = record
        return self._records[name]

    def _reader(self, name: str) -> Callable[[int, int], bytes]:
        region = self._header.regions[self._aliases.get(name, name)]
        start = self._header.data_start + region.start

        def read(offset: int, length: int) -> bytes:
            with self._lock:
                self._file.seek(start + offset)
                data = self._file.read(length)
            if len(data) != length:
                raise ValueError("the file ends early")
            return data

        return read

    # the base

    def _base_chunk(self, name: str, layout: TensorLayout) -> Callable[[int], Tensor]:
        base = self._open_base()
        stored = self._aliases.get(name, name)
        if not base.same_layout(stored, TensorLayout(layout.dtype, layout.shape, False, layout.chunk_elements)):
            raise ValueError(f"its base {base.path} has no such tensor to add the difference to")
        return lambda index: base.chunk(stored, index)

    def _open_base(self) -> "CheckpointFile":
        with self._lock:
            if self._base is None:
                self._base = self._find_base()
            return self._base

    def _find_base(self) -> "CheckpointFile":
        digest = self.base_digest
        if digest is None:
            raise ValueError("it is a difference, but the file names no base")
        given = self._given_base
        if not isinstance(given, CheckpointFile):
            path = self.path.resolve().parent / BASES / f"{digest}.safetensors" if given is None else Path(given)
            if not path.is_file():
                raise ValueError(
                    f"it is a difference from {path}, which is missing: bring that file, or give its path as `base`"
                )
            given = CheckpointFile(path)
        if given.digest != digest or given.base_digest is not None:
            raise ValueError(
                f"it is a difference from a file with digest {digest}, but {given.path} has {given.digest}"
            )
        return given

    def _naming(self, name: str) -> "_Naming":
        return _Naming(f"{self.path}: tensor {name!r}")


class _Naming:
    """Says in a ValueError which tensor it is about."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError) and not str(error).startswith(self.what):
            raise ValueError(f"{self.what} cannot be read: {error}.") from error


def _is_small(piece: tuple[str, Record, Tensor, int]) -> bool:
    return piece[1].layout.nbytes <= SMALL_BYTES


def _chunk_bytes(layout: TensorLayout, index: int) -> int:
    first, last = layout.chunk_range(index)
    return (last - first) * layout.dtype.itemsize


def _check_values(tensor: Tensor, record: Record) -> None:
    """On a CPU the decoded bytes are checked too, which costs little beside decoding."""
    if tensor.device.type == "cpu" and xxhash.xxh3_128_digest(tensor_bytes(tensor.reshape(-1))) != record.digest:
        raise ValueError("the checksum of its values is wrong")


def _are_strings(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(item, str) for item in value.values())
