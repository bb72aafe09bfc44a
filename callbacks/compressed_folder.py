"""Hugging Face folders, compressed and back: weights are coded bit for bit, everything else is copied."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from litropy.callbacks.checkpoint_reader import CheckpointFile
from litropy.callbacks.checkpoint_writer import write_checkpoint
from litropy.kernels.tensor_codec_layout import Codec

__all__ = ["METHOD", "VARIANT", "compress_folder", "decompress_folder", "verify"]

METHOD = VARIANT = "litropy"
_PLAIN = "model{}.safetensors"
_INDEX = "model.safetensors.index{}.json"
_REPORT = "litropy_report.json"
# Hugging Face takes this key for the name of the weights' file, and says that it is none; our loader takes it away
_GUARD = {"transformers_weights": "compressed: `import litropy.huggingface` first, then give variant='litropy'"}


def compress_folder(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    codec: Codec = "auto",
    threads: int = 1,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write a folder whose weights load, bit for bit, with ``from_pretrained(folder, variant="litropy")``.

    Loading needs ``import litropy.huggingface`` first; without it every way of loading is an error, as the weights'
    file has another name, ``config.json`` names one that does not exist, and each tensor has another shape. Every
    tensor is decoded again and checked.

    Args:
        source: folder with ``config.json`` and ``model*.safetensors``.
        destination: folder to write; it appears only when it is complete.
        codec: zstd, rans (a GPU decodes it), raw, or auto for the smaller.
        threads: how many chunks to code at the same time.
        progress: is told the bytes of each chunk that is written.

    Returns:
        The report, which is also in the folder as ``litropy_report.json``: bytes before and after, ratio, number of
        tensors, all of which came back exactly, seconds, and a digest of each file.

    Raises:
        ValueError: if ``source`` is no such folder or is compressed already, or ``destination`` exists.
    """
    source = Path(source)
    config = _config(source)
    if config.get("quantization_config"):
        raise ValueError(f"{source} is quantised or compressed already; give the folder of the plain weights.")
    if config.get("transformers_weights"):
        raise ValueError(
            f"{source} names its weights' file {config['transformers_weights']!r} in config.json, but only"
            " model.safetensors and its shards are read: rename the file, and drop the key `transformers_weights`."
        )
    start = time.perf_counter()
    with _new_folder(destination) as folder:
        report: dict[str, Any] = {"tensor_bytes": 0, "file_bytes": 0, "tensors": 0, "bit_exact": True, "digests": {}}
        for name in _shards(source, ""):
            new = name.replace("model", f"model.{VARIANT}", 1)
            with safetensors.safe_open(source / name, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            written = write_checkpoint(tensors, folder / new, codec=codec, threads=threads, progress=progress)
            _compare(tensors, folder / new, threads)
            report["tensor_bytes"] += written.tensor_bytes
            report["file_bytes"] += written.file_bytes
            report["tensors"] += len(tensors)
            report["digests"][new] = written.digest
        report["ratio"] = report["file_bytes"] / max(report["tensor_bytes"], 1)
        _copy_index(source, folder, "", f".{VARIANT}", lambda name: name.replace("model", f"model.{VARIANT}", 1))
        _copy_rest(source, folder)
        config |= {"quantization_config": {"quant_method": METHOD, "version": 1}, **_GUARD}
        _write_json(folder / "config.json", config)
        report["seconds"] = round(time.perf_counter() - start, 3)
        _write_json(folder / _REPORT, report)
    return report


def decompress_folder(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    threads: int = 1,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a compressed folder as the plain one that it was, for readers that know nothing of us.

    Args:
        source: folder of :func:`compress_folder`.
        destination: folder to write; it appears only when it is complete.
        threads: how many chunks to decode at the same time.
        progress: is told the bytes of each chunk that is read.

    Raises:
        ValueError: if ``source`` is no such folder or is damaged, or ``destination`` exists.
    """
    source = Path(source)
    config = _config(source)
    if (config.pop("quantization_config", None) or {}).get("quant_method") != METHOD:
        raise ValueError(f"{source} is not compressed by litropy; its config.json does not say so.")
    for key in _GUARD:
        config.pop(key, None)
    with _new_folder(destination) as folder:
        for name in _shards(source, f".{VARIANT}"):
            with CheckpointFile(source / name) as file:
                tensors = dict(file.tensors(file.names, threads=threads, progress=progress))
            new = name.replace(f"model.{VARIANT}", "model", 1)
            safetensors.torch.save_file(tensors, folder / new, metadata={"format": "pt"})
        _copy_index(source, folder, f".{VARIANT}", "", lambda name: name.replace(f"model.{VARIANT}", "model", 1))
        _copy_rest(source, folder)
        _write_json(folder / "config.json", config)


def verify(
    path: str | os.PathLike[str], *, threads: int = 1, progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Decode every tensor of a compressed file or folder, and check all checksums.

    Args:
        path: a file, or a folder of :func:`compress_folder`.
        threads: how many chunks to decode at the same time.
        progress: is told the bytes of each chunk that is read.

    Returns:
        Bytes before and after, ratio, number of tensors, and a digest of each file.

    Raises:
        ValueError: if it is damaged, naming the tensor, or not compressed by litropy.
    """
    path = Path(path)
    files = [path / name for name in _shards(path, f".{VARIANT}")] if path.is_dir() else [path]
    report: dict[str, Any] = {"tensor_bytes": 0, "file_bytes": 0, "tensors": 0, "digests": {}}
    for part in files:
        with CheckpointFile(part) as file:
            for name, tensor in file.tensors(file.names, threads=threads, progress=progress):
                report["tensor_bytes"] += tensor.nbytes if file.stored_bytes(name) else 0
                report["tensors"] += 1
            report["file_bytes"] += part.stat().st_size
            report["digests"][part.name] = file.digest
    report["ratio"] = report["file_bytes"] / max(report["tensor_bytes"], 1)
    return report


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no Hugging Face folder: it has no config.json.")
    return json.loads(path.read_text(encoding="utf-8"))


def _shards(folder: Path, variant: str) -> list[str]:
    index = folder / _INDEX.format(variant)
    if index.is_file():
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    name = _PLAIN.format(variant)
    if not (folder / name).is_file():
        raise ValueError(f"{folder} has neither {name} nor {index.name}; only safetensors are read.")
    return [name]


def _copy_index(source: Path, folder: Path, old: str, new: str, rename: Callable[[str], str]) -> None:
    path = source / _INDEX.format(old)
    if path.is_file():
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] = {key: rename(name) for key, name in index["weight_map"].items()}
        _write_json(folder / _INDEX.format(new), index)


def _copy_rest(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation config and whatever else is no weights and no config."""
    for path in source.iterdir():
        weights = path.suffix == ".safetensors" or ".safetensors.index" in path.name
        if path.is_file() and not weights and path.name not in ("config.json", _REPORT):
            shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _compare(tensors: dict[str, Tensor], path: Path, threads: int) -> None:
    """The reader checks each tensor against the digest that was taken from the original while it was written."""
    with CheckpointFile(path) as file:
        for name, back in file.tensors(tensors, threads=threads):
            assert back.dtype == tensors[name].dtype
            assert back.shape == tensors[name].shape


@contextmanager
def _new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that takes its name once it is complete."""
    path = Path(path).absolute()
    if path.exists():
        raise ValueError(f"{path} exists and is not overwritten. Give another name, or delete it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        yield new
        new.replace(path)
