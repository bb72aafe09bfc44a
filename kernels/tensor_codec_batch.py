"""Many chunks decoded at once on the device where they are needed, rANS by Triton or by PyTorch."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from litropy.kernels.rans_ceiling import put_back_torch, split_ceiling
from litropy.kernels.rans_stream import RansStream, batch_streams, parse_stream
from litropy.kernels.tensor_codec_chunks import CEILING, RANS, Plane, decode_plane, parse_payload
from litropy.kernels.tensor_codec_layout import Buffer, Impl, TensorLayout
from litropy.kernels.tensor_codec_planes import Bytes, merge_planes_torch, transform, word_bytes

__all__ = ["decode_window", "window_chunks"]

# bytes of a tensor that are decoded at once: many segments make wide vectors on a CPU and fill a GPU
_WINDOW_BYTES = {"cpu": 16 << 20}
_GPU_WINDOW_BYTES = 256 << 20


def window_chunks(layout: TensorLayout, device: torch.device) -> int:
    """How many chunks to decode at once."""
    window = _WINDOW_BYTES.get(device.type, _GPU_WINDOW_BYTES)
    return max(window // (layout.chunk_elements * layout.dtype.itemsize), 1)


def decode_window(
    window: Sequence[tuple[int, Buffer]],
    layout: TensorLayout,
    base: Sequence[Tensor | None],
    out: Tensor,
    impl: Impl,
) -> None:
    """Decode consecutive chunks.

    Args:
        window: their indices and payloads.
        layout: of the tensor.
        base: the base's chunk for each, if the layout has one.
        out: their elements, [n], on any device.
        impl: of the rANS decoder, "triton" or "torch".

    Raises:
        ValueError: when a payload is damaged.
    """
    width = word_bytes(layout.dtype)
    first = layout.chunk_range(window[0][0])[0]
    parsed = []
    for index, payload in window:
        start, stop = layout.chunk_range(index)
        count = (stop - start) * layout.dtype.itemsize // width
        try:
            parsed.append((index, count, parse_payload(payload, count, width)))
        except ValueError as error:
            raise _damaged(index, layout, error) from error
    for coded, group in itertools.groupby(parsed, lambda chunk: isinstance(chunk[2], list)):
        chunks = list(group)
        start, stop = layout.chunk_range(chunks[0][0])[0] - first, layout.chunk_range(chunks[-1][0])[1] - first
        part = out[start:stop]
        if not coded:
            as_is = [content for _, _, content in chunks if isinstance(content, memoryview)]
            part.view(torch.uint8).copy_(_upload(as_is, part.device))
            continue
        by_chunk = [(index, count, planes) for index, count, planes in chunks if isinstance(planes, list)]
        planes = torch.empty(width, sum(count for _, count, _ in by_chunk), dtype=torch.uint8, device=out.device)
        for k, plane in enumerate(planes):
            _decode_plane([(index, count, planes[k]) for index, count, planes in by_chunk], layout, plane, impl)
        others = None
        if layout.delta:
            others = torch.cat([chunk for chunk in base if chunk is not None]).to(out.device)[start:stop]
        kind = transform(layout.dtype, layout.delta)
        if impl == "triton":
            from litropy.kernels.plane_merge_triton import merge_planes

            merge_planes(planes, kind, others, part)
        else:
            merge_planes_torch(planes.unbind(), kind, others, part)


def _damaged(index: int, layout: TensorLayout, reason: object) -> ValueError:
    return ValueError(f"Chunk {index} of {layout.num_chunks} cannot be decoded: {reason}.")


def _upload(buffers: Sequence[Buffer], device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray().join(buffers), dtype=torch.uint8).to(device)


def _decode_plane(chunks: Sequence[tuple[int, int, Plane]], layout: TensorLayout, out: Tensor, impl: Impl) -> None:
    """The same plane of consecutive chunks, (index, words, plane) each, to ``out`` [n] uint8."""
    start = 0
    for is_rans, group in itertools.groupby(chunks, lambda chunk: chunk[2].method in (RANS, CEILING)):
        run = list(group)
        part = out[start : start + sum(count for _, count, _ in run)]
        start += len(part)
        streams: list[RansStream] = []
        ceilings: dict[int, tuple[int, Bytes]] = {}
        contents: list[Buffer] = []
        for index, count, plane in run:
            try:
                if plane.method == CEILING:
                    ceiling, high, stream = split_ceiling(plane.data, count)
                    ceilings[index] = ceiling, high
                    streams.append(parse_stream(stream, count))
                elif is_rans:
                    streams.append(parse_stream(plane.data, count))
                else:
                    contents.append(decode_plane(plane, count).data)
            except ValueError as error:
                raise _damaged(index, layout, error) from error
        if not is_rans:
            part.copy_(_upload(contents, out.device))
            continue
        if impl == "triton":
            from litropy.kernels.rans_triton import decode_batch
        else:
            from litropy.kernels.rans_torch import decode_batch
        batch = batch_streams(streams)
        intact = decode_batch(batch, part).cpu().numpy()
        if not intact.all():
            index = run[batch.table_of[intact.argmin()]][0]
            raise _damaged(index, layout, "a rANS stream does not end where it must, its states or words are wrong")
        for (index, _, _), symbols in zip(run, part.split([count for _, count, _ in run]), strict=True):
            if index in ceilings:
                try:
                    put_back_torch(symbols, *ceilings[index])
                except ValueError as error:
                    raise _damaged(index, layout, error) from error
