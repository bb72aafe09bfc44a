"""Removing checkpoints while another thread still writes the one that takes their place."""

import threading
from collections.abc import Callable
from pathlib import Path

__all__ = ["Removals"]


class Removals:
    """Keeps the newest checkpoint on disk until a newer one is there.

    ``AsyncCheckpointIO`` returns from saving before anything is written, so ``ModelCheckpoint`` may remove the only
    checkpoint that exists, or one that is yet to be written. Such a removal waits for the next save to end.

    Args:
        remove: removes a file, if it is there.
    """

    def __init__(self, remove: Callable[[Path], None]) -> None:
        self._remove = remove
        self._waiting: list[Path] = []
        self._newest: Path | None = None
        self._saver: int | None = None
        self._lock = threading.Lock()

    def remove(self, path: Path) -> None:
        """Remove a checkpoint, now or after the next save."""
        with self._lock:
            elsewhere = self._saver not in (None, threading.get_ident())
            if elsewhere and (path == self._newest or not path.exists()):
                self._waiting.append(path)
                return
        self._remove(path)

    def saving(self) -> None:
        """Take note of the thread that saves."""
        with self._lock:
            self._saver = threading.get_ident()

    def committed(self, path: Path) -> None:
        """Take note that a checkpoint is on disk, and remove what waited for one."""
        with self._lock:
            self._newest = path
            ready = [old for old in self._waiting if old != path and old.exists()]
            self._waiting = [old for old in self._waiting if old not in ready]
        for old in ready:
            self._remove(old)
