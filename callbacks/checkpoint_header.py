"""The header of a safetensors file: read without trust, and written with a checksum over itself."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any, TypeGuard

import xxhash

__all__ = ["VERSION", "Header", "Region", "parse_header", "read_header", "render_header"]

VERSION = "1"
_MOST_BYTES = 100_000_000  # safetensors' own limit
_BLANK = "0" * 32
_CHECKSUM = "litropy_checksum"


@dataclass(frozen=True)
class Region:
    """Where a tensor's bytes lie, counted from the start of the data."""

    start: int
    stop: int
    rank: int


@dataclass(frozen=True)
class Header:
    """A header that has been checked: regions in file order, and the strings of ``__metadata__``."""

    regions: Mapping[str, Region]
    metadata: Mapping[str, str]
    digest: str
    data_start: int


def render_header(regions: Mapping[str, Region], metadata: Mapping[str, str], nbytes: int | None = None) -> bytes:
    """Write the first bytes of the file: length, JSON, spaces up to ``nbytes``; and the checksum in the JSON.

    A region is uint8 and has one dimension more than the tensor that it encodes, so that it is never taken for it.

    Args:
        regions: where each tensor lies.
        metadata: strings to keep.
        nbytes: length of the result; None takes the least.

    Raises:
        ValueError: if the header is longer than safetensors allows.
    """
    entries: dict[str, Any] = {
        name: {
            "dtype": "U8",
            "shape": [1] * region.rank + [region.stop - region.start],
            "data_offsets": [region.start, region.stop],
        }
        for name, region in regions.items()
    }
    strings = {"format": "pt", "litropy_version": VERSION, _CHECKSUM: _BLANK, **metadata}
    text = json.dumps({"__metadata__": strings, **entries}, separators=(",", ":")).encode()
    length = (len(text) + 8 + 7) // 8 * 8 if nbytes is None else nbytes
    if length > _MOST_BYTES:
        raise ValueError(
            f"The header would take {length} bytes, of at most {_MOST_BYTES}: too many tensors, or too much state that"
            " is no tensor."
        )
    assert len(text) + 8 <= length, "the room that was kept for the header is too small"
    text = text.ljust(length - 8)
    checksum = xxhash.xxh3_128_hexdigest(text)
    return (length - 8).to_bytes(8, "little") + text.replace(_marked(_BLANK), _marked(checksum), 1)


def _marked(checksum: str) -> bytes:
    return f'"{_CHECKSUM}":"{checksum}"'.encode()


def read_header(file: IO[bytes], file_size: int) -> Header:
    """Read and check the header of an open file, see :func:`parse_header`."""
    length = int.from_bytes(file.read(8), "little")
    if file_size < 8 or length > min(_MOST_BYTES, file_size - 8):
        raise ValueError(
            f"its header would have {length} bytes, but the file has {file_size} and headers {_MOST_BYTES} at most"
        )
    return parse_header(file.read(length), file_size - 8 - length)


def parse_header(text: bytes, data_bytes: int) -> Header:
    """Check a header: version, checksum, and that the regions fill the data without overlaps and gaps.

    Args:
        text: the JSON.
        data_bytes: how many bytes follow it in the file.

    Raises:
        ValueError: naming the tensor where there is one.
    """
    try:
        entries = json.loads(text, object_pairs_hook=_without_duplicates)
    except (RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"its header is no JSON ({error}): it is damaged, or no safetensors file") from error
    metadata = entries.pop("__metadata__", None) if isinstance(entries, dict) else None
    if not isinstance(metadata, dict) or "litropy_version" not in metadata:
        raise ValueError("it is no compressed file of litropy (its header does not say so)")
    if metadata["litropy_version"] != VERSION:
        raise ValueError(
            f"it has version {metadata['litropy_version']!r}, this litropy reads {VERSION!r}: update litropy"
        )
    digest = metadata.get(_CHECKSUM)
    if not all(isinstance(value, str) for value in metadata.values()) or digest is None:
        raise ValueError("its metadata is damaged")
    if xxhash.xxh3_128_hexdigest(text.replace(_marked(digest), _marked(_BLANK), 1)) != digest:
        raise ValueError("the checksum of its header is wrong: it is damaged")
    regions = {name: _region(name, entry, data_bytes) for name, entry in entries.items()}
    regions = dict(sorted(regions.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = 0
    for name, region in regions.items():
        if region.start != end:
            raise ValueError(f"tensor {name!r} starts at byte {region.start}, where {end} is due: overlap or gap")
        end = region.stop
    if end != data_bytes:
        raise ValueError(
            f"its tensors have {end} bytes, but {data_bytes} follow the header: it is truncated, or not ours"
        )
    return Header(regions, metadata, digest, len(text) + 8)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"tensor {twice!r} is in its header twice")
    return result


def _region(name: str, entry: Any, data_bytes: int) -> Region:
    fields = entry if isinstance(entry, dict) else {}
    shape, offsets = fields.get("shape"), fields.get("data_offsets")
    if fields.get("dtype") != "U8" or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has a damaged entry in the header")
    start, stop = offsets
    if not start <= stop <= data_bytes:
        raise ValueError(f"tensor {name!r} lies at bytes {start} to {stop}, but only {data_bytes} follow the header")
    if shape != [1] * (len(shape) - 1) + [stop - start]:
        raise ValueError(f"tensor {name!r} has shape {shape}, which are not the {stop - start} bytes that it has")
    return Region(start, stop, len(shape) - 1)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
