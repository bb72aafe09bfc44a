"""Write a file so that its name always holds something whole, whatever happens meanwhile."""

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

__all__ = ["atomic_write", "locked", "remove_abandoned", "sync_folder"]

_SUFFIX = ".litropy-partial"

if sys.platform == "win32":

    def _try_lock(file: IO[bytes], wait: bool) -> bool:
        # Windows keeps open files from being removed, which is what the lock is for
        return True

else:
    import fcntl

    def _try_lock(file: IO[bytes], wait: bool) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that takes the name ``path`` once it is complete and on disk.

    The file is written beside its final place, flushed to disk and renamed, and the rename itself is flushed. If
    anything fails or the process dies, an earlier file of that name stays as it was. Of several writers of one path,
    the last to finish wins. What a killed process left is removed when the folder is written to next.

    Args:
        path: final name of the file; its folder is made if missing.

    Raises:
        OSError: with the path and what the system said, such as a full disk or a folder that cannot be written.
    """
    new: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent)
        new, opened = _open_new(path)
        with opened as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(new, path)
        sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"{path} could not be written: {reason}. An earlier file of that name is still whole"
        raise OSError(error.errno, message) from error
    finally:
        if new is not None:
            with suppress(OSError):
                new.unlink()


def _open_new(path: Path) -> tuple[Path, IO[bytes]]:
    while True:
        new = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_SUFFIX}")
        file = open(new, "xb")  # noqa: SIM115
        # the lock says that somebody still writes here; another process may have tidied up just before it was taken
        if _try_lock(file, wait=False) and new.exists():
            return new, file
        file.close()


def remove_abandoned(folder: Path) -> None:
    """Remove temporary files whose writer has died."""
    for path in folder.glob(f".*{_SUFFIX}"):
        with suppress(OSError), open(path, "rb") as file:
            if _try_lock(file, wait=False):
                path.unlink()


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock file ``path``, and hold it."""
    with open(path, "ab") as file:
        _try_lock(file, wait=True)
        yield
