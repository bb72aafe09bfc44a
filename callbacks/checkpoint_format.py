"""Compressed files of tensors: valid ``.safetensors``, bit for bit, checked, and read in parts."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litropy.callbacks.checkpoint_reader import CheckpointFile
from litropy.callbacks.checkpoint_writer import Written, write_checkpoint
from litropy.kernels.tensor_codec_layout import Codec

__all__ = ["load_file", "open_file", "save_file"]


def save_file(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    codec: Codec = "auto",
    base: str | os.PathLike[str] | None = None,
    state: Any = None,
    threads: int = 1,
) -> Written:
    """Compress tensors into one file, whole or not at all.

    Any dtype, device, strides and shape; tensors that are the same view are stored once. An earlier file of that name
    stays until the new one is complete and on disk. Peak memory is a few chunks of 2 MiB.

    Args:
        tensors: tensors by name.
        path: the file, by convention ``*.safetensors``.
        codec: zstd, rans (which a GPU decodes), raw, or auto for the smallest.
        base: a file of earlier tensors; differences from those of the same name are stored where that is smaller, and
            loading then needs this file.
        state: anything that JSON can hold, kept beside the tensors.
        threads: how many chunks to encode at the same time.

    Returns:
        Digest and sizes.

    Raises:
        ValueError: if a tensor has no values (meta), is sharded, sparse or of an unknown dtype, or the base is damaged.
        OSError: if the file cannot be written.

    Example::

        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "weights.safetensors")
        >>> written = save_file({"w": torch.zeros(1000, 100)}, path)
        >>> written.tensor_bytes, written.file_bytes < 4000
        (400000, True)
        >>> load_file(path)["w"].shape
        torch.Size([1000, 100])
    """
    if threads < 1:
        raise ValueError(f"`threads` is {threads}; it must be at least 1.")
    if base is None:
        return write_checkpoint(tensors, Path(path), state=state, codec=codec, threads=threads)
    with CheckpointFile(base) as opened:
        if opened.base_digest is not None:
            raise ValueError(f"{base} holds differences itself; give the file that those are against, or none.")
        return write_checkpoint(tensors, Path(path), state=state, codec=codec, base=opened, threads=threads)


def load_file(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    base: str | os.PathLike[str] | None = None,
    threads: int = 1,
) -> dict[str, Tensor]:
    """Load all tensors of a compressed file, each bit for bit as it was saved.

    Args:
        path: a file of :func:`save_file`.
        device: where to decode.
        base: the file that this one holds differences against; None looks in ``key_frames`` beside it.
        threads: how many chunks to decode at the same time.

    Returns:
        Tensors by name; contiguous, each with memory of its own.

    Raises:
        ValueError: if the file is damaged or no such file, naming the tensor.
    """
    with CheckpointFile(path, base) as file:
        return dict(file.tensors(file.names, device, threads))


def open_file(path: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None) -> CheckpointFile:
    """Open a compressed file to read some of it.

    Args:
        path: a file of :func:`save_file`.
        base: the file that this one holds differences against; None looks in ``key_frames`` beside it.

    Returns:
        A context manager with ``names``, ``layout(name)``, ``tensor(name)``, ``rows(name, start, stop)`` and ``state``.

    Raises:
        ValueError: if the file is damaged or no such file.

    Example::

        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "weights.safetensors")
        >>> _ = save_file({"w": torch.arange(12.0).view(6, 2)}, path)
        >>> with open_file(path) as file:
        ...     file.rows("w", 1, 3)
        tensor([[2., 3.],
                [4., 5.]])
    """
    return CheckpointFile(path, base)
