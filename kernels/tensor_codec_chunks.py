"""A chunk's payload: its words as they are, or its byte planes, each coded by whatever suits it.

A payload begins with a byte that says which; all numbers are little-endian:

    0x00    the words follow
    0x01    for each plane, most significant first, u8 method and u32 bytes; then those bytes

    method    bytes
    0 raw     [n]
    1 same    [1], n times
    2 zstd    one Zstandard frame that says its content size, n, and needs no dictionary
    3 rans    a stream of ``rans_stream``
    4 groups  u32 bytes, a Zstandard frame of so many: an offset for each 128 symbols; one of the symbols less those
    5 ceiling what reaches it, and a stream: see ``rans_ceiling``
"""

import itertools
import struct
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray

from litropy.kernels.rans_ceiling import NO_CEILING, encode_clipped, put_back, split_ceiling
from litropy.kernels.rans_stream import LONG_SEGMENT, parse_stream
from litropy.kernels.tensor_codec_groups import GROUP, add_offsets, subtract_offsets
from litropy.kernels.tensor_codec_layout import SEGMENT, Buffer, Coder, TensorPlan, room_bytes
from litropy.kernels.tensor_codec_planes import (
    Bytes,
    Words,
    numba_loops,
    scratch_planes,
    split_planes,
    transform,
)

__all__ = [
    "CEILING", "RANS", "Plane", "decode_plane", "encode_plane", "parse_payload", "scratch_room", "write_chunk",
    "zstd_bytes",
]  # fmt: skip

_WORDS, _PLANES = b"\x00", b"\x01"
RAW, SAME, ZSTD, RANS, GROUPS, CEILING = range(6)
_ENTRY = struct.Struct("<BI")
_SIZE = struct.Struct("<I")
# of ``zstd``, and of what ``huffman`` cannot code: next to no search for matches, so that Huffman coding remains,
# with tables made anew every 128 KiB
_LITERALS = {"window_log": 17, "hash_log": 6, "min_match": 7, "strategy": zstandard.STRATEGY_FAST}
_MATCH_LEVEL = 3
# symbols that tell most planes from one that repeats a single symbol
_FIRST = 256
_threads = threading.local()


class Plane(NamedTuple):
    """A coded plane."""

    method: int
    data: Buffer


def _compressor(coder: Coder) -> zstandard.ZstdCompressor:
    """This thread's own: compressors are not to be shared."""
    if not hasattr(_threads, coder):
        parameters = (
            zstandard.ZstdCompressionParameters.from_level(_MATCH_LEVEL)
            if coder == "zstd_match"
            else zstandard.ZstdCompressionParameters(**_LITERALS)
        )
        setattr(_threads, coder, zstandard.ZstdCompressor(compression_params=parameters))
    compressor: zstandard.ZstdCompressor = getattr(_threads, coder)
    return compressor


def zstd_bytes(plane: Bytes, coder: Coder) -> bytes:
    """A Zstandard frame."""
    return _compressor(coder).compress(plane.data)


def _put(data: Buffer, room: Bytes) -> int:
    """Bytes to where a plane goes, if they are fewer than that has; how many they are."""
    if len(data) < room.size:
        room[: len(data)] = np.frombuffer(data, np.uint8)
    return len(data)


def _put_frame(plane: Bytes, coder: Coder, room: Bytes) -> int:
    """A Zstandard frame, by our own encoder where matches are not worth a search."""
    if coder == "huffman" and numba_loops() is not None:
        from litropy.kernels.zstd_literals import LEAST_BLOCK, compress_literals

        if plane.size >= LEAST_BLOCK and (size := compress_literals(plane, room)):
            return size
    return _put(zstd_bytes(plane, coder), room)


def _put_groups(plane: Bytes, room: Bytes) -> int:
    offsets, rest = subtract_offsets(plane)
    head = zstd_bytes(offsets, "zstd")
    start = _put(_SIZE.pack(len(head)) + head, room)
    return start + _put_frame(rest, "huffman", room[start:])


def _put_rans(plane: Bytes, room: Bytes, segment: int) -> tuple[int, int]:
    ceiling, stream = encode_clipped(plane, segment)
    return RANS if ceiling == NO_CEILING else CEILING, _put(stream, room)


def encode_plane(plane: Bytes, coder: Coder, room: Bytes, segment: int = SEGMENT) -> tuple[int, int]:
    """Code a plane by what the plan says, or by less where that is smaller.

    Args:
        plane: [n], n > 0.
        coder: from the plan.
        room: where to, at least ``room_bytes(n)``; the plane may lie there already.
        segment: of rANS.

    Returns:
        The method, and how many bytes.
    """
    if (plane[:_FIRST] == plane[0]).all() and (plane == plane[0]).all():
        room[0] = plane[0]
        return SAME, 1
    method, size = RAW, plane.size
    if coder == "rans":
        method, size = _put_rans(plane, room, segment)
    elif coder == "groups":
        method, size = GROUPS, _put_groups(plane, room)
    elif coder != "raw":
        method, size = ZSTD, _put_frame(plane, coder, room)
    if size < plane.size:
        return method, size
    if plane.ctypes.data != room.ctypes.data:
        room[: plane.size] = plane
    return RAW, plane.size


def scratch_room(nbytes: int) -> Bytes:
    """Room for a payload, which this thread's next call gives out again: fresh memory would take long to clear."""
    if not hasattr(_threads, "room") or _threads.room.size < room_bytes(nbytes):
        _threads.room = np.empty(room_bytes(nbytes), np.uint8)
    room: Bytes = _threads.room
    return room


def write_chunk(words: Words, plan: TensorPlan, base: Words | None, room: Bytes) -> int:
    """Write a payload.

    Args:
        words: of the chunk.
        plan: of the tensor.
        base: words to take differences from, if the plan has a base.
        room: where to, at least ``room_bytes(words.nbytes)``.

    Returns:
        How many bytes.
    """
    if plan.coders:
        kind = transform(plan.layout.dtype, plan.layout.delta)
        segment = LONG_SEGMENT if plan.layout.delta else SEGMENT
        size = _write_planes(words, kind, base, plan.coders, segment, room)
        if size <= words.nbytes:
            return size
    room[0] = _WORDS[0]
    room[1 : 1 + words.nbytes] = words.view(np.uint8)
    return 1 + words.nbytes


def _write_planes(
    words: Words, kind: int, base: Words | None, coders: Sequence[Coder], segment: int, room: Bytes
) -> int:
    room[0] = _PLANES[0]
    at, first = 1 + len(coders) * _ENTRY.size, 0
    # planes that stay as they are go straight to their place, once it is known
    for stays, run in itertools.groupby(coders, "raw".__eq__):
        group = list(run)
        if stays:
            place = room[at : at + len(group) * words.size].reshape(len(group), words.size)
            planes = split_planes(words, kind, base, place, first)
        else:
            planes = scratch_planes(words, kind, base, first, len(group))
        for plane, coder in zip(planes, group, strict=True):
            method, size = encode_plane(plane, coder, room[at:], segment)
            _ENTRY.pack_into(room.data, 1 + first * _ENTRY.size, method, size)
            at, first = at + size, first + 1
    return at


def parse_payload(payload: Buffer, count: int, word_bytes: int) -> memoryview | list[Plane]:
    """The words of a chunk as they are, or its planes.

    Args:
        payload: of the chunk.
        count: words of the chunk.
        word_bytes: planes of the chunk.

    Raises:
        ValueError: when it is not the payload of such a chunk.
    """
    data = memoryview(payload).cast("B")
    if len(data) > count * word_bytes + 1:
        raise ValueError(f"{len(data)} bytes are more than {count} words of {word_bytes} bytes can take")
    kind, rest = bytes(data[:1]), data[1:]
    if kind == _WORDS:
        if len(rest) != count * word_bytes:
            raise ValueError(f"{len(rest)} bytes are not {count} words of {word_bytes} bytes")
        return rest
    if kind != _PLANES:
        raise ValueError(f"it starts with {kind!r}, which no packing does: {_WORDS!r} and {_PLANES!r} are allowed")
    head, rest = rest[: word_bytes * _ENTRY.size], rest[word_bytes * _ENTRY.size :]
    if len(head) < word_bytes * _ENTRY.size:
        raise ValueError(f"{len(data)} bytes are too few to list {word_bytes} planes")
    planes = []
    for method, size in _ENTRY.iter_unpack(head):
        if size > len(rest):
            raise ValueError(f"a plane of {size} bytes is listed where {len(rest)} are left")
        expected = {RAW: count, SAME: 1}.get(method, size)
        if method > CEILING or size != expected:
            raise ValueError(
                f"a plane of method {method} has {size} bytes; methods are 0 to {CEILING}, {count} symbols"
            )
        planes.append(Plane(method, rest[:size]))
        rest = rest[size:]
    if len(rest):
        raise ValueError(f"{len(rest)} bytes are left over")
    return planes


def decode_plane(plane: Plane, count: int) -> Bytes:
    """The bytes of a plane [n]; rANS by the compiled decoder.

    Raises:
        ValueError: when it is damaged.
    """
    if plane.method == RAW:
        return np.frombuffer(plane.data, np.uint8)
    if plane.method == SAME:
        return np.full(count, plane.data[0], np.uint8)
    if plane.method == ZSTD:
        return _decode_zstd(plane.data, count)
    if plane.method == GROUPS:
        return _decode_groups(memoryview(plane.data), count)
    from litropy.kernels.rans_numba import decode_stream

    out = np.empty(count, np.uint8)
    if plane.method == RANS:
        decode_stream(parse_stream(plane.data, count), out)
    else:
        ceiling, high, stream = split_ceiling(plane.data, count)
        decode_stream(parse_stream(stream, count), out)
        put_back(out, ceiling, high)
    return out


def _decode_groups(data: memoryview, count: int) -> Bytes:
    if len(data) < _SIZE.size or _SIZE.unpack(data[: _SIZE.size])[0] > len(data) - _SIZE.size:
        raise ValueError(f"{len(data)} bytes cannot hold a frame of offsets and one of symbols")
    stop = _SIZE.size + _SIZE.unpack(data[: _SIZE.size])[0]
    offsets = _decode_zstd(data[_SIZE.size : stop], -(-count // GROUP))
    return add_offsets(_decode_zstd(data[stop:], count), offsets)


def _decode_zstd(data: Buffer, count: int) -> NDArray[np.uint8]:
    if not hasattr(_threads, "decompressor"):
        _threads.decompressor = zstandard.ZstdDecompressor()
    try:
        # before anything of that size is allocated
        stated = zstandard.get_frame_parameters(data).content_size
        if stated != count:
            raise ValueError(f"a Zstandard frame says it holds {stated} bytes, not {count}")
        content = _threads.decompressor.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"a Zstandard frame is damaged: {error}") from error
    if len(content) != count:
        raise ValueError(f"a Zstandard frame holds {len(content)} bytes, not {count}")
    return np.frombuffer(content, np.uint8)
