"""Tensors to compressed bytes and back, bit for bit.

The low entropy of a float is in its exponent: of Gaussian weights it has 2.5 bits where 8 are stored, whatever their
scale. So words are split into byte planes, and the planes that compress are coded, by Zstandard's Huffman coder or by
interleaved rANS; the others stay as they are. Against a base, the differences of the integers are coded instead.

    layout and payloads = encode_tensor(tensor)      tensor = decode_tensor(layout and payloads)

Files and checksums are the caller's: a payload may be damaged without it showing, in bytes that are stored as they are.
"""

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from litropy.kernels.host_memory import Rooms, empty
from litropy.kernels.in_order import in_order
from litropy.kernels.tensor_codec_base import base_chunk, fitting_base, plan_base
from litropy.kernels.tensor_codec_batch import decode_window, window_chunks
from litropy.kernels.tensor_codec_choice import FEW_BYTES, choose_coders, sample_ranges
from litropy.kernels.tensor_codec_chunks import decode_plane, parse_payload, scratch_room, write_chunk
from litropy.kernels.tensor_codec_layout import (
    CHUNK_BYTES,
    DTYPES,
    SEGMENT,
    Base,
    Buffer,
    Codec,
    EncodedTensor,
    Impl,
    TensorLayout,
    TensorPlan,
    flat_chunk,
    room_bytes,
)
from litropy.kernels.tensor_codec_planes import (
    Bytes,
    merge_planes,
    numba_loops,
    split_planes,
    transform,
    word_bytes,
    words,
)

__all__ = [
    "CHUNK_BYTES", "DTYPES", "Codec", "EncodedTensor", "TensorLayout", "TensorPlan", "decode_chunk", "decode_chunks",
    "decode_tensor", "encode_chunk", "encode_chunk_into", "encode_chunks", "encode_tensor", "flat_chunk", "plan_tensor",
]  # fmt: skip

_CODECS, _IMPLS = ("auto", "zstd", "rans", "raw"), ("auto", "numba", "torch", "triton")
# differences up to this size "auto" does not code: a frame would not be smaller
_FEW_DELTA_BYTES = 64
# of so many bytes NumPy asks for large pages
_MUCH_BYTES = 4 << 20


def plan_tensor(
    tensor: Tensor, *, codec: Codec = "auto", base: Base = None, chunk_bytes: int = CHUNK_BYTES
) -> TensorPlan:
    """Look at a sample of a tensor and choose how to code it.

    Args:
        tensor: of any of ``DTYPES``, any shape, strides and device.
        codec: "zstd", "rans" or "raw": what the planes that compress are coded by. "auto": by whichever is smaller,
            rANS where it saves at least 0.5 % of the tensor (0.1 % against a base), and nothing for up to 2 KiB
            (64 bytes against a base).
        base: code differences from this: a tensor of the same dtype and shape, or what gives its chunks by index.
        chunk_bytes: bytes of the tensor that a chunk holds, rounded down to whole segments of 32,768 elements.

    Returns:
        The plan; its ``estimated_bytes`` tell whether a base pays.

    Raises:
        ValueError: when the tensor cannot be coded, or the base does not fit it.

    Example:
        >>> plan = plan_tensor(torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)).bfloat16())
        >>> plan.codec, plan.coders, round(plan.estimated_bytes / plan.layout.nbytes, 2)
        ('zstd', ('huffman', 'raw'), 0.66)
    """
    if codec not in _CODECS:
        raise ValueError(f"`codec` must be one of {_CODECS}, got {codec!r}.")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ValueError(
            f"Only dense tensors that hold data can be coded, got {tensor.layout} of {tensor.dtype} on {tensor.device}."
        )
    chunk_elements = max(chunk_bytes // tensor.dtype.itemsize // SEGMENT, 1) * SEGMENT
    layout = TensorLayout(tensor.dtype, tuple(tensor.shape), base is not None, chunk_elements)
    verbatim = layout.nbytes + layout.num_chunks
    few = _FEW_DELTA_BYTES if layout.delta else FEW_BYTES
    if codec == "raw" or layout.nbytes <= (few if codec == "auto" else 0):
        return TensorPlan(layout, "raw", (), verbatim)
    kind = transform(layout.dtype, layout.delta)
    sample, base_sample = [], []
    per = layout.dtype.itemsize // word_bytes(layout.dtype)
    for index, slices in sample_ranges(layout):
        values, others = flat_chunk(tensor, layout, index), base_chunk(base, layout, index)
        parts = [slice(per * part.start, per * part.stop) for part in slices]
        x, y = words(values), None if others is None else words(others)
        sample += [x[part] for part in parts]
        base_sample += [] if y is None else [y[part] for part in parts]
    planes = split_planes(np.concatenate(sample), kind, np.concatenate(base_sample) if base_sample else None)
    total, chunk = per * layout.numel, per * chunk_elements
    coders, estimate = choose_coders(planes, total, chunk, codec, kind, layout.delta)
    if all(coder == "raw" for coder in coders):
        return TensorPlan(layout, "raw", (), verbatim)
    chosen: Codec = "rans" if "rans" in coders else "zstd"
    return TensorPlan(layout, chosen, coders, min(estimate + 30 * layout.num_chunks, verbatim))


def encode_chunk(values: Tensor, plan: TensorPlan, *, base: Tensor | None = None) -> bytes:
    """Code one chunk. Several threads may do so at once; the inputs are only read.

    Args:
        values: elements of the chunk [n], as ``flat_chunk`` gives them.
        plan: of the tensor.
        base: the same chunk of the base, if the plan has one.

    Returns:
        The payload: at most one byte longer than the chunk.

    Raises:
        ValueError: when a base is missing, too many, or of another dtype or length.

    Example:
        >>> ones = torch.ones(40_000)
        >>> len(encode_chunk(ones, plan_tensor(ones)))
        25
    """
    room = scratch_room(values.nbytes)
    return room[: encode_chunk_into(values, plan, room, base=base)].tobytes()


def encode_chunk_into(values: Tensor, plan: TensorPlan, room: Bytes, *, base: Tensor | None = None) -> int:
    """Code one chunk into memory of the caller's, of at least ``room_bytes(values.nbytes)``.

    Returns:
        How many bytes the payload has, which is what ``encode_chunk`` gives.

    Raises:
        ValueError: as ``encode_chunk`` does, and when the room is too small.
    """
    if room.size < room_bytes(values.nbytes):
        raise ValueError(f"{room.size} bytes of room are too few: `room_bytes` says {room_bytes(values.nbytes)}.")
    others = fitting_base(base, plan.layout, len(values)) if plan.coders else None
    return write_chunk(words(values), plan, None if others is None else words(others), room)


def encode_chunks(tensor: Tensor, plan: TensorPlan, *, base: Base = None, threads: int = 1) -> Iterator[bytes]:
    """The payloads of a tensor, in order, without ever holding more than ``threads`` + 1 of them.

    Args:
        tensor: what the plan was made for.
        plan: from ``plan_tensor``.
        base: as given to ``plan_tensor``.
        threads: how many chunks are coded at once.

    Yields:
        One payload a chunk.

    Raises:
        ValueError: as ``flat_chunk`` and ``encode_chunk`` do.
    """

    def encode(index: int) -> bytes:
        return encode_chunk(flat_chunk(tensor, plan.layout, index), plan, base=plan_base(base, plan, index))

    return in_order(encode, range(plan.layout.num_chunks), min(threads, plan.layout.num_chunks))


def encode_tensor(
    tensor: Tensor, *, codec: Codec = "auto", base: Base = None, chunk_bytes: int = CHUNK_BYTES, threads: int = 1
) -> EncodedTensor:
    """Code a tensor.

    Args:
        tensor: as for ``plan_tensor``, like all but the last.
        codec: which coders may be taken.
        base: code differences from this.
        chunk_bytes: bytes of the tensor that a chunk holds.
        threads: how many chunks are coded at once.

    Returns:
        The layout and the payloads.

    Raises:
        ValueError: when the tensor cannot be coded, or the base does not fit it.

    Example:
        >>> weight = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
        >>> encoded = encode_tensor(weight)
        >>> round(encoded.nbytes / encoded.layout.nbytes, 2), torch.equal(decode_tensor(encoded), weight)
        (0.66, True)
    """
    plan = plan_tensor(tensor, codec=codec, base=base, chunk_bytes=chunk_bytes)
    layout = plan.layout
    if layout.nbytes < _MUCH_BYTES:
        return EncodedTensor(layout, plan.codec, tuple(encode_chunks(tensor, plan, base=base, threads=threads)))
    # payloads side by side, in large pages, which take less time to be had; what is left over was never touched
    memory = np.empty(room_bytes(layout.nbytes + layout.num_chunks), np.uint8)
    ends = [0]
    rooms, in_place = Rooms(), threads <= 1

    def encode(index: int) -> tuple[Bytes, int]:
        values, others = flat_chunk(tensor, layout, index), plan_base(base, plan, index)
        room = memory[ends[-1] :] if in_place else rooms.take(room_bytes(values.nbytes))
        return room, encode_chunk_into(values, plan, room, base=others)

    for room, size in in_order(encode, range(layout.num_chunks), threads):
        if not in_place:
            memory[ends[-1] : ends[-1] + size] = room[:size]
            rooms.give(room)
        ends.append(ends[-1] + size)
    # views that are still there are not looked at any more
    memory.resize(ends[-1], refcheck=False)
    memory.setflags(write=False)
    return EncodedTensor(layout, plan.codec, tuple(memory.data[a:b] for a, b in itertools.pairwise(ends)))


def decode_chunk(
    payload: Buffer,
    layout: TensorLayout,
    index: int,
    *,
    base: Tensor | None = None,
    out: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Decode one chunk on a CPU. Several threads may do so at once.

    Args:
        payload: of the chunk, at any address.
        layout: of the tensor.
        index: of the chunk.
        base: the same chunk of the base, if the layout has one.
        out: where to decode to: a contiguous CPU tensor of the chunk's length and dtype; without it one is made.
        impl: of the rANS decoder: "numba", "torch", "triton" (needs the interpreter on a CPU), or "auto": Numba's if it
            is installed, else PyTorch's.

    Returns:
        The elements [n].

    Raises:
        ValueError: when the payload is not of such a chunk or damaged, or base or out do not fit.

    Example:
        >>> encoded = encode_tensor(torch.arange(5))
        >>> decode_chunk(encoded.chunks[0], encoded.layout, 0)
        tensor([0, 1, 2, 3, 4])
    """
    start, stop = layout.chunk_range(index)
    if out is None:
        out = torch.empty(stop - start, dtype=layout.dtype)
    elif (out.dtype, out.shape, out.device.type) != (layout.dtype, (stop - start,), "cpu") or not out.is_contiguous():
        raise ValueError(
            f"`out` must be a contiguous CPU tensor of {stop - start} {layout.dtype}, "
            f"got {out.dtype} {tuple(out.shape)} on {out.device}."
        )
    resolved = _resolve(impl, out.device)
    others = fitting_base(base, layout, stop - start)
    if resolved != "numba":
        decode_window([(index, payload)], layout, [others], out, resolved)
        return out
    x = words(out)
    try:
        parsed = parse_payload(payload, x.size, x.itemsize)
        if isinstance(parsed, memoryview):
            x.view(np.uint8)[:] = np.frombuffer(parsed, np.uint8)
        else:
            planes = [decode_plane(plane, x.size) for plane in parsed]
            merge_planes(planes, transform(layout.dtype, layout.delta), None if others is None else words(others), x)
    except ValueError as error:
        raise ValueError(f"Chunk {index} of {layout.num_chunks} cannot be decoded: {error}.") from error
    return out


def decode_chunks(
    payloads: Iterable[Buffer],
    layout: TensorLayout,
    *,
    base: Base = None,
    device: torch.device | str = "cpu",
    impl: Impl = "auto",
    threads: int = 1,
) -> Tensor:
    """Decode a tensor, taking its payloads one by one.

    Args:
        payloads: one a chunk, in order; a window of them is held at a time.
        layout: of the tensor.
        base: what differences were taken from, if the layout says so: a tensor, or what gives its chunks by index.
        device: where the tensor goes, and where bytes become words again.
        impl: of the rANS decoder: "triton" (a GPU, or the interpreter), "numba" (a CPU), "torch" (anything), or "auto":
            the first of these that can.
        threads: how many chunks a CPU decodes at once.

    Returns:
        The tensor, contiguous, of memory of its own.

    Raises:
        ValueError: when a payload is damaged, there are too few or too many, or the base does not fit.
    """
    out = empty(layout.shape, layout.dtype, device)
    flat = out.view(-1)
    numbered = _counted(payloads, layout)
    resolved = _resolve(impl, out.device)
    if resolved != "numba":
        while window := list(itertools.islice(numbered, window_chunks(layout, out.device))):
            start, stop = layout.chunk_range(window[0][0])[0], layout.chunk_range(window[-1][0])[1]
            others = [base_chunk(base, layout, index) for index, _ in window]
            decode_window(window, layout, others, flat[start:stop], resolved)
        return out

    def decode(item: tuple[int, Buffer]) -> None:
        index, payload = item
        start, stop = layout.chunk_range(index)
        decode_chunk(payload, layout, index, base=base_chunk(base, layout, index), out=flat[start:stop], impl=resolved)

    deque(in_order(decode, numbered, min(threads, layout.num_chunks)), maxlen=0)
    return out


def decode_tensor(
    encoded: EncodedTensor,
    *,
    device: torch.device | str = "cpu",
    base: Base = None,
    impl: Impl = "auto",
    threads: int = 1,
) -> Tensor:
    """Decode a tensor: ``decode_chunks`` of its layout and chunks.

    Args:
        encoded: from ``encode_tensor``.
        device: where the tensor goes.
        base: what differences were taken from.
        impl: of the rANS decoder.
        threads: how many chunks a CPU decodes at once.

    Returns:
        The tensor.

    Raises:
        ValueError: when a payload is damaged, or the base does not fit.

    Example:
        >>> old, new = torch.zeros(3), torch.tensor([0.0, float("nan"), -0.0])
        >>> decode_tensor(encode_tensor(new, base=old), base=old)
        tensor([0., nan, -0.])
    """
    return decode_chunks(encoded.chunks, encoded.layout, base=base, device=device, impl=impl, threads=threads)


def _resolve(impl: Impl, device: torch.device) -> Impl:
    if impl not in _IMPLS:
        raise ValueError(f"`impl` must be one of {_IMPLS}, got {impl!r}.")
    if impl == "auto":
        if device.type == "cpu":
            return "torch" if numba_loops() is None else "numba"
        return "triton" if device.type == "cuda" else "torch"
    if impl == "numba" and (device.type != "cpu" or numba_loops() is None):
        raise ValueError(f"`impl='numba'` needs a CPU and the package numba, but decodes on {device.type}. Use 'auto'.")
    if impl == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"`impl='triton'` needs a GPU, but decodes on {device.type}. Use impl='auto', or set TRITON_INTERPRET=1 "
            "before Python starts to run the kernels in Triton's interpreter (slow, for tests)."
        )
    return impl


def _counted(payloads: Iterable[Buffer], layout: TensorLayout) -> Iterator[tuple[int, Buffer]]:
    """Payloads with their chunk's index; ValueError where there are too few or too many."""
    count = 0
    for count, payload in enumerate(payloads, 1):
        if count > layout.num_chunks:
            break
        yield count - 1, payload
    if count != layout.num_chunks:
        came = "more" if count > layout.num_chunks else count
        raise ValueError(f"A tensor of {layout.num_chunks} chunks came with {came} payloads.")
