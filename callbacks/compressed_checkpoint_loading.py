"""Compressed training checkpoints, back as what Lightning put in."""

import io
import os
from collections.abc import Collection
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule

from litropy.callbacks.checkpoint_reader import CheckpointFile
from litropy.callbacks.checkpoint_tree import unflatten_tree

__all__ = ["KIND", "is_torch_file", "load_from_checkpoint", "read_checkpoint"]

KIND = "lightning checkpoint"
_Module = TypeVar("_Module", bound=LightningModule)


def read_checkpoint(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    without: Collection[str] = (),
    threads: int = 1,
) -> dict[str, Any]:
    """Read a checkpoint that :class:`CompressedCheckpointIO` wrote, as the dict that Lightning made.

    Args:
        path: the file.
        device: where its tensors go.
        without: keys to leave out, which are then not decoded, such as ``optimizer_states``.
        threads: how many chunks to decode at the same time.

    Returns:
        The checkpoint.

    Raises:
        ValueError: if the file is damaged, or no checkpoint.
    """
    with CheckpointFile(path) as file:
        state = file.state
        if not isinstance(state, dict) or state.get("kind") != KIND or not isinstance(state.get("tree"), dict):
            raise ValueError(f"{path} holds tensors, but no training checkpoint; `load_file` reads it.")
        tree = {key: value for key, value in state["tree"].items() if key not in without}
        # tensors are named by their path; whatever else the tree may ask for is read then
        wanted = [name for name in file.names if name.partition("/")[0] in tree]
        loaded = dict(file.tensors(wanted, device, threads))

        def tensor_named(name: str) -> torch.Tensor:
            return loaded.pop(name) if name in loaded else file.tensor(name, device, threads)

        try:
            return unflatten_tree(tree, tensor_named)
        except ValueError as error:
            raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error


def is_torch_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one of ``torch.save``."""
    with open(path, "rb") as file:
        start = file.read(9)
    # ours begins with the length of its header, which may be any number, and then the header
    return start[:2] in (b"PK", b"\x80\x02") and start[8:] != b"{"


def load_from_checkpoint(
    cls: type[_Module],
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    strict: bool | None = None,
    **kwargs: Any,
) -> _Module:
    """Do what ``cls.load_from_checkpoint(path)`` does, for a compressed checkpoint.

    The state of the optimisers is left out, as it is of no use to a module.

    Args:
        cls: the LightningModule.
        path: a file of :class:`CompressedCheckpointIO`.
        device: where the module goes.
        strict: whether the weights must be exactly those of the module; None takes the module's own setting.
        kwargs: arguments of ``cls`` in place of those that were saved.

    Returns:
        The module, with its weights.

    Raises:
        ValueError: if the file is damaged, or no checkpoint.

    Example::

        model = load_from_checkpoint(LanguageModel, "runs/pretrain/version_0/checkpoints/best.ckpt")
    """
    checkpoint = read_checkpoint(path, without=("optimizer_states",))
    # Lightning reads only what torch.save wrote; this never leaves memory, and holds nothing that was pickled before
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    del checkpoint
    buffer.seek(0)
    return cls.load_from_checkpoint(buffer, map_location=device, strict=strict, weights_only=False, **kwargs)
