"""Who compresses tensors, and how each is called; whoever is not installed says so when it is made."""

import importlib
import importlib.metadata
import importlib.util
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import zstandard
from torch import Tensor

from litropy.callbacks.checkpoint_format import load_file, save_file
from litropy.kernels.tensor_codec import decode_tensor, encode_tensor

Tensors = Mapping[str, Tensor]
FLOATS = ("bfloat16", "float16", "float32")


class Coder(NamedTuple):
    """Encode tensors, given those of an earlier checkpoint or None; decode, given the same; count bytes."""

    encode: Callable[[Tensors, Tensors | None], Any]
    decode: Callable[[Any, Tensors | None], Tensors] | None
    nbytes: Callable[[Any], int]


class Contender(NamedTuple):
    """One that runs, and what it can do."""

    name: str
    make: Callable[[int], Coder]  # threads
    package: str | None = None
    most_threads: int = 64
    deltas: bool = False
    dtypes: tuple[str, ...] = (*FLOATS, "mixed")


def _bytes(x: Tensor) -> memoryview:
    return memoryview(x.contiguous().flatten().view(torch.uint8).numpy())


def _tensor(data: Any, like: Tensor) -> Tensor:
    """What a decoder gives, without a copy, in the dtype and shape of a tensor."""
    if not like.numel():
        return torch.empty(like.shape, dtype=like.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(data, dtype=like.dtype).view(like.shape)


def _each(
    tensors: Tensors, base: Tensors | None, encode: Callable[[Tensor, Tensor | None], Any]
) -> dict[str, tuple[Any, Tensor]]:
    """Blobs, each with an empty tensor that knows dtype and shape."""
    return {
        name: (encode(x, None if base is None else base[name]), torch.empty_like(x, device="meta"))
        for name, x in tensors.items()
    }


def _of_buffers(encode: Callable[..., Any], decode: Callable[..., Any]) -> Coder:
    """A coder of single buffers."""

    def back(blobs: dict[str, tuple[Any, Tensor]], base: Tensors | None) -> Tensors:
        return {
            name: _tensor(decode(blob, like, None if base is None else base[name]), like)
            for name, (blob, like) in blobs.items()
        }

    return Coder(partial(_each, encode=encode), back, lambda blobs: sum(len(blob) for blob, _ in blobs.values()))


def _litropy(codec: Any) -> Callable[[int], Coder]:
    def make(threads: int) -> Coder:
        def encode(x: Tensor, base: Tensor | None) -> Any:
            return encode_tensor(x, codec=codec, base=base, threads=threads)

        def decode(blobs: Any, base: Tensors | None) -> Tensors:
            return {
                name: decode_tensor(blob, base=None if base is None else base[name], threads=threads)
                for name, (blob, _) in blobs.items()
            }

        return Coder(
            partial(_each, encode=encode), decode, lambda blobs: sum(blob.nbytes for blob, _ in blobs.values())
        )

    return make


def _of_files(write: Callable[[Tensors, Path], object], read: Callable[[Path], Tensors]) -> Coder:
    """A coder that works on files, in memory where the system has a folder for that."""
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = tempfile.TemporaryDirectory(prefix="litropy-benchmark-", dir=shared)

    def encode(tensors: Tensors, base: Tensors | None) -> Any:
        path = Path(folder.name, "file")
        write(tensors, path)
        return path

    return Coder(encode, lambda path, base: read(path), lambda path: path.stat().st_size)


def _litropy_file(threads: int) -> Coder:
    return _of_files(partial(_written, threads=threads), partial(load_file, threads=threads))


def _written(tensors: Tensors, path: Path, threads: int) -> None:
    save_file(tensors, path, threads=threads)


def _torch_save(threads: int) -> Coder:
    return _of_files(lambda tensors, path: torch.save(dict(tensors), path), torch.load)


def _safetensors(threads: int) -> Coder:
    def read(path: Path) -> Tensors:
        # it maps the file, which costs nothing until the tensors are looked at
        return {name: x.clone() for name, x in safetensors.torch.load_file(path).items()}

    return _of_files(lambda tensors, path: safetensors.torch.save_file(dict(tensors), path), read)


def _zstd(threads: int) -> Coder:
    compressor = zstandard.ZstdCompressor(level=3, threads=0 if threads == 1 else threads)
    return _of_buffers(
        lambda x, base: compressor.compress(_bytes(x)),
        lambda blob, like, base: zstandard.ZstdDecompressor().decompress(blob),
    )


def _blosc2(threads: int) -> Coder:
    blosc2 = importlib.import_module("blosc2")

    def encode(x: Tensor, base: Tensor | None) -> bytes:
        options = {"codec": blosc2.Codec.ZSTD, "clevel": 1, "filters": [blosc2.Filter.SHUFFLE], "nthreads": threads}
        return blosc2.compress2(_bytes(x), typesize=x.itemsize, **options)

    return _of_buffers(encode, lambda blob, like, base: blosc2.decompress2(blob, nthreads=threads))


def _zipnn(threads: int) -> Coder:
    zipnn = importlib.import_module("zipnn")

    def coder(dtype: torch.dtype, delta: bool) -> Any:
        # it knows no integers; of those there are only step counts here
        name = str(dtype).removeprefix("torch.")
        options = {"bytearray_dtype": name if name in FLOATS else "float32", "threads": threads}
        return zipnn.ZipNN(input_format="byte", **options, **({"delta_compressed_type": "byte"} if delta else {}))

    def encode(x: Tensor, base: Tensor | None) -> Any:
        if base is None:
            # it writes into what it is given, so live weights need a copy
            return coder(x.dtype, False).compress(bytearray(_bytes(x)))
        return coder(x.dtype, True).compress(_bytes(x), delta_second_data=_bytes(base))

    def decode(blob: Any, like: Tensor, base: Tensor | None) -> Any:
        if base is None:
            return coder(like.dtype, False).decompress(blob)
        return coder(like.dtype, True).decompress(blob, delta_second_data=_bytes(base))

    return _of_buffers(encode, decode)


def _z4ai(threads: int) -> Coder:
    z4ai = importlib.import_module("z4ai")
    codes = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

    def encode(x: Tensor, base: Tensor | None) -> bytes:
        if base is None:
            return z4ai.compress(_bytes(x), dtype=codes.get(x.dtype), threads=threads)
        return z4ai.compress_delta(_bytes(x), _bytes(base), dtype=codes.get(x.dtype), threads=threads)

    def decode(blob: bytes, like: Tensor, base: Tensor | None) -> Any:
        return z4ai.decompress(blob) if base is None else z4ai.decompress_delta(blob, _bytes(base))

    return _of_buffers(encode, decode)


def _bigsmall(threads: int) -> Coder:
    # its import would ask for a newer version over the network
    os.environ["BIGSMALL_DISABLE_VERSION_CHECK"] = "1"
    bigsmall = importlib.import_module("bigsmall")

    def write(tensors: Tensors, path: Path) -> None:
        plain = path.with_suffix(".safetensors")
        safetensors.torch.save_file(dict(tensors), plain)
        bigsmall.compress(plain, path, workers=threads, progress=False)

    return _of_files(write, partial(bigsmall.load, progress=False))


def _dfloat11(threads: int) -> Coder:
    # the package itself does not import on a current stack, and decodes on a GPU alone; its encoder is a file by itself
    place = importlib.metadata.distribution("dfloat11").locate_file("dfloat11/dfloat11_utils.py")
    spec = importlib.util.spec_from_file_location("dfloat11_utils", str(place))
    assert spec is not None
    assert spec.loader is not None
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)

    def encode(tensors: Tensors, base: Tensors | None) -> int:
        weights = [x.flatten() for x in tensors.values()]
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            _, counts = utils.get_codec(torch.cat(weights))
            codec, _, table = utils.get_32bit_codec(counts)
            codes, others, positions, gaps, _ = utils.encode_weights(weights, codec, 8, 512)
            tables = utils.get_luts(table)
        return sum(part.nbytes for part in (codes, others, positions, gaps, tables))

    return Coder(encode, None, lambda nbytes: nbytes)


CONTENDERS = (
    Contender("litropy, auto", _litropy("auto"), deltas=True),
    Contender("litropy, zstd", _litropy("zstd"), deltas=True),
    Contender("litropy, rans", _litropy("rans"), deltas=True),
    Contender("litropy, file", _litropy_file),
    Contender("zipnn", _zipnn, "zipnn", deltas=True),
    Contender("z4ai", _z4ai, "z4ai", most_threads=1, deltas=True),
    Contender("bigsmall, file", _bigsmall, "bigsmall", most_threads=1),
    Contender("dfloat11, encoder", _dfloat11, "dfloat11", most_threads=1, dtypes=("bfloat16",)),
    Contender("blosc2, zstd 1, shuffled", _blosc2, "blosc2"),
    Contender("zstd 3", _zstd),
    Contender("torch.save", _torch_save, most_threads=1),
    Contender("safetensors", _safetensors, most_threads=1),
)


PACKAGES = (*(one.package for one in CONTENDERS if one.package), "zstandard", "safetensors", "numba")
