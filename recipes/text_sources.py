"""From what a user calls a source (a file, a folder, a glob, the standard library) to documents."""

import glob
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from litropy.recipes.docstring_records import docstring_records
from litropy.recipes.text_files import SUFFIXES, Record, read_records, read_text
from litropy.recipes.text_records import Documents, collect

__all__ = ["fingerprint", "read_sources", "source_files", "stdlib_files"]

_STDLIB = ("stdlib", "stdlib_docstrings")
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}


def stdlib_files() -> list[Path]:
    """Python files of the running interpreter's standard library, without tests and installed packages, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (path for path in files if not _NOT_STDLIB.intersection(path.parts))
    return [root / path for path in sorted(kept, key=Path.as_posix)]


def source_files(source: str) -> list[Path]:
    """Files that a source stands for, sorted.

    Args:
        source: ``stdlib``, ``stdlib_docstrings``, or the path of a file, a folder (searched at any depth) or a glob.

    Raises:
        ValueError: if nothing is there, or nothing of a known type.
    """
    if source in _STDLIB:
        return stdlib_files()
    path = Path(source).expanduser()
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in SUFFIXES]
        if not files:
            raise ValueError(
                f"The folder {source} has no file of a known type ({', '.join(SUFFIXES)}){_listing(path)}."
            )
        return sorted(files)
    if path.is_file():
        _check_suffix(path)
        return [path]
    if glob.has_magic(source):
        files = sorted(file for name in glob.glob(str(path), recursive=True) if (file := Path(name)).is_file())
        if not files:
            raise ValueError(f"No file matches the glob {source}; `**` reaches into folders at any depth.")
        for file in files:
            _check_suffix(file)
        return files
    hint = "" if path.suffix else f" For a dataset on the Hugging Face hub, set `dataset: {source}` instead."
    raise ValueError(f"There is no file or folder {source}{_listing(path.parent)}.{hint}")


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{path}: files of type {path.suffix or '(none)'} are not known; known are {', '.join(SUFFIXES)}."
        )


def _listing(folder: Path, limit: int = 5) -> str:
    if not folder.is_dir():
        return f", nor a folder {folder}"
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    more = ", ..." if len(names) > limit else ""
    return f"; {folder.resolve()} holds {', '.join(names[:limit]) + more if names else 'nothing'}"


def fingerprint(sources: list[str]) -> list[Any]:
    """Names, sizes and times of all files behind the sources: it changes when their content does."""
    found: list[Any] = []
    for source in sources:
        if source in _STDLIB:
            sizes = [path.stat().st_size for path in stdlib_files()]
            found.append([source, platform.python_version(), len(sizes), sum(sizes)])
            continue
        for path in source_files(source):
            stat = path.stat()
            found.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    return found


def read_sources(sources: list[str], text_column: str = "text") -> Documents:
    """Documents of all sources, one after another.

    Args:
        sources: see ``source_files``.
        text_column: field or column that holds plain text in .jsonl, .json, .csv and .parquet files.

    Raises:
        ValueError: if a source is missing, unreadable or empty, or kinds of records are mixed.
    """
    documents = collect(record for source in sources for record in _records(source, text_column))
    if not len(documents):
        raise ValueError(f"There is no text in {', '.join(sources)}: every file is empty.")
    return documents


def _records(source: str, text_column: str) -> Iterator[Record]:
    for path in source_files(source):
        if source not in _STDLIB:
            yield from read_records(path, text_column)
            continue
        try:
            text = read_text(path)
        except ValueError:  # a few files of the standard library are in other encodings, on purpose
            continue
        if source == "stdlib":
            yield "text", text, str(path)
        else:
            yield from (("prompt_completion", record, str(path)) for record in docstring_records(text))
