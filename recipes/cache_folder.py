"""Folders of derived data that appear complete or not at all."""

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["cache_key", "cached_folder"]


def cache_key(**settings: Any) -> str:
    """Short name for a set of settings; equal settings have equal names on every machine.

    Args:
        **settings: anything that JSON can write.

    Returns:
        16 hexadecimal digits.

    Example::

        >>> cache_key(seed=0, files=["a.txt"]) == cache_key(files=["a.txt"], seed=0)
        True
    """
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cached_folder(root: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Folder ``root/name``, written now if it does not exist yet.

    Args:
        root: where all cached folders lie; made if missing.
        name: of the folder; should contain a ``cache_key`` of everything that its content depends on.
        write: fills an empty folder. If it fails, or the process dies in it, nothing called ``name`` is left.

    Returns:
        The folder.
    """
    folder = root / name
    if folder.is_dir():
        return folder
    temporary = root / f".{name}.{uuid.uuid4().hex[:8]}"
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
