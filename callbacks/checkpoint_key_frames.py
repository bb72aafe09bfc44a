"""Keeps the files that others hold differences against, for as long as one of those others exists."""

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from litropy.callbacks.checkpoint_atomic import locked, sync_folder
from litropy.callbacks.checkpoint_header import read_header
from litropy.callbacks.checkpoint_reader import BASES

__all__ = ["KeyFrames"]


class KeyFrames:
    """The folder ``key_frames`` beside checkpoints.

    A key frame has a second name there (a hard link, which takes no space), made of its digest. So renaming,
    overwriting or removing the checkpoint leaves it in reach of the differences, and no name can lead to wrong content.

    Args:
        folder: where the checkpoints are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._store = folder / BASES
        self._known: dict[tuple[int, int, int], str | None] = {}

    def path(self, digest: str) -> Path:
        """Where the key frame of a digest is, if it is kept."""
        return self._store / f"{digest}.safetensors"

    def exists(self) -> bool:
        """Whether there has ever been a key frame."""
        return self._store.is_dir()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from adding and removing key frames."""
        self._store.mkdir(parents=True, exist_ok=True)
        with locked(self._store / ".lock"):
            yield

    def add(self, path: Path, digest: str) -> None:
        """Keep a file that was just written; call this while ``held``."""
        kept = self.path(digest)
        if kept.exists():
            return
        try:
            os.link(path, kept)
        except OSError:
            # a file system without hard links; under its digest only once it is whole
            new = kept.with_suffix(".copy")
            shutil.copyfile(path, new)
            new.replace(kept)
        sync_folder(self._store)

    def collect(self, keep: Collection[str]) -> None:
        """Remove key frames that no checkpoint in the folder needs; call this while ``held``.

        Args:
            keep: digests to keep in any case.
        """
        try:
            needed = {self._base_of(path) for path in self.folder.iterdir() if path.is_file()}
        except OSError:
            return  # what cannot be looked at may need any of them
        for path in self._store.glob("*.safetensors"):
            if path.stem not in needed and path.stem not in keep:
                path.unlink(missing_ok=True)

    def _base_of(self, path: Path) -> str | None:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            key = (status.st_ino, status.st_mtime_ns, status.st_size)
            if key not in self._known:
                try:
                    self._known[key] = read_header(file, status.st_size).metadata.get("litropy_base")
                except ValueError:
                    self._known[key] = None  # another kind of file
            return self._known[key]
