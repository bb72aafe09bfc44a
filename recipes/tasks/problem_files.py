"""Read problems and their right answers from files and datasets, in the fields of GSM8K and MATH among others."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from litropy.recipes.hub_dataset import open_dataset
from litropy.recipes.tasks.answer_format import extract_answer
from litropy.recipes.tasks.task import Spec
from litropy.recipes.text_files import read_text
from litropy.recipes.text_sources import source_files

__all__ = ["dataset_problems", "file_problems", "parse_problem"]

_QUESTIONS = ("question", "problem", "prompt")
_MARK = "####"


def parse_problem(record: object, where: str) -> Spec:
    r"""See a record as a problem.

    The question is in ``question``, ``problem`` or ``prompt``. The right answer is what follows ``####`` in ``answer``
    (GSM8K), or all of ``answer``, or what is boxed last in ``solution`` (MATH); the text before ``####``, or
    ``solution``, is the way to it. A record without ``answer`` and ``solution`` is for a reward of the user's.

    Args:
        record: with named fields.
        where: its place, for errors.

    Returns:
        ``question``; ``answer`` and ``worked`` (None where there is none); ``record`` with all fields.

    Raises:
        ValueError: if there is no question, or an answer that is not text or a number, or a solution without an answer.

    Example::

        >>> parse_problem({"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}, "gsm8k.jsonl, line 1")["answer"]
        '2'
        >>> parse_problem({"problem": "1+1?", "solution": r"It is $\boxed{2}$."}, "math.jsonl, line 1")["answer"]
        '2'
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with named fields, found {type(record).__name__}.")
    names = [name for name in _QUESTIONS if isinstance(record.get(name), str) and record[name].strip()]
    if not names:
        raise ValueError(f"{where}: expected the question as text in one of the fields {', '.join(_QUESTIONS)}.")
    answer, worked = record.get("answer"), record.get("solution")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str | None) or not isinstance(worked, str | None):
        raise ValueError(f"{where}: `answer` and `solution` should be text.")
    if answer is not None and _MARK in answer:
        before, _, answer = answer.rpartition(_MARK)
        worked = re.sub("<<[^<>]*>>", "", before).strip()
        answer = answer.strip().replace(",", "")
    elif answer is None and worked is not None:
        answer = extract_answer(worked, "boxed")
        if answer is None:
            raise ValueError(rf"{where}: `solution` has no \boxed{{}} answer; add the field `answer`.")
    if answer is not None and not answer.strip():
        raise ValueError(f"{where}: `answer` is empty.")
    return {"question": record[names[0]], "answer": answer, "worked": worked, "record": record}


def file_problems(sources: list[str]) -> list[Spec]:
    """Problems from .jsonl, .json and .parquet files.

    Args:
        sources: paths of files, folders or globs.

    Raises:
        ValueError: if there are none, or one cannot be read, naming file and line.
    """
    found = [
        parse_problem(record, where)
        for source in sources
        for path in source_files(source)
        for record, where in _records(path)
    ]
    if not found:
        raise ValueError(f"There are no problems in {', '.join(sources)}: every file is empty.")
    return found


def dataset_problems(name: str, config: str | None, split: str) -> list[Spec]:
    """Problems from a dataset of Hugging Face.

    Args:
        name: on the hub, or a folder.
        config: which configuration, where it has several.
        split: such as ``train``.

    Raises:
        ValueError: if it cannot be loaded, or has none, or one is malformed, naming the row.
    """
    dataset = open_dataset(name, config, split, streaming=False)
    found = [parse_problem(row, f"{name}, row {number}") for number, row in enumerate(dataset, 1)]
    if not found:
        raise ValueError(f"The dataset {name!r} has no rows.")
    return found


def _records(path: Path) -> Iterator[tuple[Any, str]]:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if line.strip():
                yield _loads(line, f"{path}, line {number}"), f"{path}, line {number}"
    elif suffix == ".json":
        value = _loads(read_text(path), str(path))
        for number, record in enumerate(value if isinstance(value, list) else [value], 1):
            yield record, f"{path}, record {number}"
    elif suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        raise ValueError(f"{path}: problems are read from .jsonl, .json and .parquet files.")


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deep"
        raise ValueError(f"{where}: not valid JSON ({reason}).") from error


def _parquet_rows(path: Path) -> Iterator[tuple[Any, str]]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}).") from error
    for number, row in enumerate(rows, 1):
        yield row, f"{path}, row {number}"
