"""Training checkpoints, compressed: key frames, and differences from them."""

import os
import re
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor

from litropy.callbacks.checkpoint_key_frames import KeyFrames
from litropy.callbacks.checkpoint_reader import CheckpointFile
from litropy.callbacks.checkpoint_tree import flatten_tree
from litropy.callbacks.checkpoint_writer import Written, write_checkpoint
from litropy.callbacks.compressed_checkpoint_loading import KIND, is_torch_file, read_checkpoint
from litropy.callbacks.compressed_checkpoint_removal import Removals
from litropy.kernels.tensor_codec_layout import Codec

__all__ = ["CompressedCheckpointIO", "RefuseSharded", "refuse_sharded"]

_SHARDING = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)


@dataclass
class _Frame:
    """The key frame of a folder, and how many differences have been written against it."""

    frames: KeyFrames
    digest: str = ""
    deltas: int = 0


class CompressedCheckpointIO(CheckpointIO):
    """Write every checkpoint of a run compressed, without pickle, and read it back bit for bit.

    Nothing else changes: ``ModelCheckpoint`` with top-k and ``last``, ``ckpt_path``, and the files' names stay as they
    are; checkpoints of ``torch.save`` can still be read.

    With ``key_frame_every`` above 1, checkpoints between two key frames hold differences from the last one, tensor by
    tensor, where those are smaller. What a difference needs stays in the folder ``key_frames`` for as long as it is
    needed, whatever is removed: that pays where many checkpoints are kept, not where two are.

    A file is written beside its final place, flushed to disk and renamed: a killed run leaves the checkpoint before.

    Args:
        codec: zstd (fast on a CPU), rans (a GPU decodes it), raw, or auto for the smaller of those.
        key_frame_every: every how many checkpoints in a folder one is complete; with 1 each file stands alone.
        threads: how many chunks to code at the same time.

    Raises:
        ValueError: if an option is out of its range.

    Example::

        trainer = Trainer(plugins=[CompressedCheckpointIO()])
        trainer = Trainer(plugins=[AsyncCheckpointIO(CompressedCheckpointIO())])
    """

    made = False  # whether there has been one in this process

    def __init__(self, codec: Codec = "auto", key_frame_every: int = 1, threads: int = 1) -> None:
        for name, value in (("key_frame_every", key_frame_every), ("threads", threads)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1.")
        self.codec: Codec = codec
        self.key_frame_every = key_frame_every
        self.threads = threads
        self._folders: dict[Path, _Frame] = {}
        self._removals = Removals(self._remove)
        self._saving = threading.Lock()
        CompressedCheckpointIO.made = True

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Compress a checkpoint into one file, whole or not at all.

        Args:
            checkpoint: what Lightning collected.
            path: the file.
            storage_options: not used.

        Raises:
            ValueError: if it holds an object that cannot be stored, or shards.
            OSError: if the file cannot be written; an earlier one of that name is still whole.
        """
        if storage_options is not None:
            raise ValueError(
                f"`storage_options` is {storage_options!r}; it must be None: options are the plugin's own."
            )
        target = _local(path)
        if target.is_dir():
            raise ValueError(_sharded_error(f"{target} is a folder"))
        tree, tensors = flatten_tree(checkpoint)
        state = {"kind": KIND, "tree": tree}
        self._removals.saving()
        with self._saving:
            if self.key_frame_every == 1:
                write_checkpoint(tensors, target, state=state, codec=self.codec, threads=self.threads)
            else:
                self._save(tensors, state, target)
        self._removals.committed(target)

    def _save(self, tensors: dict[str, Tensor], state: Any, path: Path) -> Written:
        folder = self._folder(path)
        while True:
            with ExitStack() as stack:
                base = self._base(folder, tensors)
                if base is not None:
                    stack.enter_context(base)

                def hold() -> None:
                    # from here on no other run can take the base away
                    stack.enter_context(folder.frames.held())
                    if base is not None and not folder.frames.path(base.digest).exists():  # noqa: B023
                        raise _BaseIsGoneError

                try:
                    written = write_checkpoint(
                        tensors,
                        path,
                        state=state,
                        codec=self.codec,
                        base=base,
                        threads=self.threads,
                        before_rename=hold,
                    )
                except _BaseIsGoneError:
                    folder.digest = ""
                    continue
                if written.deltas:
                    folder.deltas += 1
                else:
                    folder.frames.add(path, written.digest)
                    folder.digest, folder.deltas = written.digest, 0
                folder.frames.collect({folder.digest})
                return written

    def _folder(self, path: Path) -> _Frame:
        place = path.parent.absolute()
        return self._folders.setdefault(place, _Frame(KeyFrames(place)))

    def _base(self, folder: _Frame, tensors: dict[str, Tensor]) -> CheckpointFile | None:
        """The key frame to take differences from; None if the next checkpoint is to be one."""
        if not folder.digest or folder.deltas >= self.key_frame_every - 1:
            return None
        try:
            base = CheckpointFile(folder.frames.path(folder.digest))
        except (OSError, ValueError):
            return None
        names = set(base.names)
        total = sum(tensor.nbytes for tensor in tensors.values())
        if 2 * sum(tensor.nbytes for name, tensor in tensors.items() if name in names) >= total:
            return base
        # a checkpoint of weights alone is of little use to one with the optimiser
        base.close()
        return None

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: str | torch.device | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint, compressed or of ``torch.save``.

        Args:
            path: the file.
            map_location: where its tensors go; None is the CPU.
            weights_only: only for a file of ``torch.save``; ours hold no code in any case.

        Raises:
            ValueError: if it is damaged, naming the tensor, or what it is a difference from is missing.
            FileNotFoundError: if there is no such file.
        """
        source = _local(path)
        if source.is_dir():
            raise ValueError(_sharded_error(f"{source} is a folder"))
        if not source.exists():
            raise FileNotFoundError(f"There is no checkpoint {source}.")
        if is_torch_file(source):
            return TorchCheckpointIO().load_checkpoint(source, map_location or "cpu", weights_only)  # type: ignore[arg-type]
        if map_location is not None and not isinstance(map_location, str | torch.device):
            raise ValueError(f"`map_location` is {map_location!r}; it must be a device or None.")
        return read_checkpoint(source, map_location or "cpu", threads=self.threads)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint, and key frames that nothing needs any more.

        While another thread saves, the newest checkpoint on disk stays until a newer one is there.
        """
        self._removals.remove(_local(path))

    def _remove(self, path: Path) -> None:
        if path.is_dir():
            raise ValueError(_sharded_error(f"{path} is a folder"))
        folder = self._folder(path)
        if not folder.frames.exists():
            path.unlink(missing_ok=True)
            return
        with folder.frames.held():
            path.unlink(missing_ok=True)
            folder.frames.collect({folder.digest})

    def teardown(self) -> None:
        """Forget the key frames; those that no checkpoint needs are removed."""
        for folder in self._folders.values():
            if folder.digest and folder.frames.folder.is_dir():
                with folder.frames.held():
                    folder.frames.collect(())
        self._folders.clear()


class _BaseIsGoneError(Exception):
    """Another run has removed the key frame meanwhile."""


def refuse_sharded(strategy: Strategy) -> None:
    """Refuse a strategy that writes shards past :class:`CompressedCheckpointIO`, without asking it.

    Args:
        strategy: the trainer's; one without the plugin is always fine.

    Raises:
        ValueError: naming the strategy and what to use instead.
    """
    plugin: CheckpointIO | None = strategy.checkpoint_io
    while isinstance(plugin, _WrappingCheckpointIO):
        plugin = plugin.checkpoint_io
    if isinstance(plugin, CompressedCheckpointIO) and isinstance(strategy, _SHARDING):
        raise ValueError(_sharded_error(type(strategy).__name__))


class RefuseSharded(Callback):
    """Refuse a strategy that writes shards past :class:`CompressedCheckpointIO`, before anything is trained.

    Such a strategy never asks the plugin, so where litropy is installed Lightning adds this to every trainer made after
    a plugin.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look at the strategy."""
        refuse_sharded(trainer.strategy)


def _sharded_error(what: str) -> str:
    """Say that sharded checkpoints are not compressed, and what to do."""
    return (
        f"{what}: a sharded checkpoint, which CompressedCheckpointIO does not write. Leave the plugin out, or train on"
        " a single device or with DDP (`--trainer.strategy ddp`)."
    )


def _local(path: str | os.PathLike[str]) -> Path:
    text = os.fspath(path)
    if re.match(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise ValueError(f"{text} is no local path; write checkpoints to a disk, and copy them from there.")
    return Path(text.removeprefix("file://"))
