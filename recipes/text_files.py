"""Read records from the files that a source names; every error says which file and which line."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from litropy.recipes.text_records import Kind, parse_record

__all__ = ["SUFFIXES", "read_records", "read_text"]

Record = tuple[Kind, Any, str]


def read_text(path: Path) -> str:
    """Content of a UTF-8 file.

    Raises:
        ValueError: if it cannot be read, naming the line at which it stops being UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text; convert the file, or leave it out.") from error


def read_records(path: Path, text_column: str = "text") -> Iterator[Record]:
    """Yield kind, item and place of every record in a file.

    Args:
        path: a file with one of ``SUFFIXES``. Text files are one document each.
        text_column: field or column that holds plain text.

    Raises:
        ValueError: if a record cannot be read, naming file and line.
    """
    return _READERS[path.suffix.lower()](path, text_column)


def _read_document(path: Path, text_column: str) -> Iterator[Record]:
    yield "text", read_text(path), str(path)


def _read_jsonl(path: Path, text_column: str) -> Iterator[Record]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield *parse_record(_loads(line, where), where, text_column), where


def _read_json(path: Path, text_column: str) -> Iterator[Record]:
    value = _loads(read_text(path), str(path))
    for number, record in enumerate(value if isinstance(value, list) else [value], 1):
        where = f"{path}, record {number}"
        yield *parse_record(record, where, text_column), where


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text else ""
        raise ValueError(f"{where}{line}: not valid JSON ({error.msg}, column {error.colno}).") from error


def _read_csv(path: Path, text_column: str) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    line = 1
    try:
        for row in reader:
            line, where = reader.line_num + 1, f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                count = len(reader.fieldnames or [])
                raise ValueError(f"{where}: the number of cells differs from the header's {count}.")
            yield *parse_record(row, where, text_column), where
    except csv.Error as error:
        raise ValueError(f"{path}, from line {line} on: not valid CSV ({error}).") from error


def _read_parquet(path: Path, text_column: str) -> Iterator[Record]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                where = f"{path}, row {number}"
                yield *parse_record(row, where, text_column), where
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}).") from error


_READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    ".txt": _read_document,
    ".md": _read_document,
    ".py": _read_document,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

SUFFIXES = tuple(_READERS)
