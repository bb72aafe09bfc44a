"""Documents of a dataset of Hugging Face, whole or as a stream."""

from collections.abc import Iterator, Sequence
from typing import Any, overload

from litropy.recipes.text_records import Documents, collect, document_text, parse_record

__all__ = ["dataset_documents", "head", "open_dataset"]


def open_dataset(name: str, config: str | None, split: str, streaming: bool) -> Any:
    """Open one split with ``datasets.load_dataset``.

    Args:
        name: on the Hugging Face hub, or a folder.
        config: which of the dataset's configurations, where it has several.
        split: such as ``train``, or ``train[:10%]``.
        streaming: read while training, rather than download everything first.

    Raises:
        ValueError: if there is no such dataset, configuration or split.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError("`dataset` needs the package datasets: `pip install datasets`.") from error
    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # datasets raises errors of a dozen kinds, its dependencies a few more
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        which = f"{name!r}" + (f" ({config})" if config else "")
        raise ValueError(f"The dataset {which}, split {split!r}, could not be loaded: {reason}") from error


def dataset_documents(dataset: Any, name: str, text_column: str) -> Documents:
    """See a dataset's rows as documents; rows are read when they are asked for.

    Args:
        dataset: of ``open_dataset``, no stream.
        name: for errors.
        text_column: column with plain text.

    Raises:
        ValueError: if it has no rows, or rows of no known kind.
    """
    if not len(dataset):
        raise ValueError(f"The dataset {name!r} has no rows.")
    kind, _ = parse_record(dataset[0], f"{name}, row 1", text_column)
    return Documents(kind, _Rows(dataset, name, text_column))


def head(stream: Any, name: str, text_column: str, max_documents: int, max_characters: int) -> Documents:
    """Documents at the beginning of a stream.

    Args:
        stream: of ``open_dataset``.
        name: for errors.
        text_column: column with plain text.
        max_documents: how many at most.
        max_characters: how much text at most, but for the last document.

    Raises:
        ValueError: if there is nothing.
    """

    def records() -> Iterator[Any]:
        characters = 0
        for number, row in enumerate(stream, 1):
            where = f"{name}, row {number}"
            kind, item = parse_record(row, where, text_column)
            yield kind, item, where
            characters += len(document_text(kind, item))
            if number >= max_documents or characters >= max_characters:
                return

    documents = collect(records())
    if not len(documents):
        raise ValueError(f"The dataset {name!r} has no text.")
    return documents


class _Rows(Sequence[Any]):
    """Rows of a dataset, parsed one by one."""

    def __init__(self, dataset: Any, name: str, text_column: str) -> None:
        self.dataset = dataset
        self.name = name
        self.text_column = text_column

    def __len__(self) -> int:
        return len(self.dataset)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        return self._parse(self.dataset[index], index)

    def __iter__(self) -> Iterator[Any]:
        return (self._parse(row, number) for number, row in enumerate(self.dataset))

    def _parse(self, row: Any, number: int) -> Any:
        return parse_record(row, f"{self.name}, row {number + 1}", self.text_column)[1]

    def select(self, indices: Any) -> "_Rows":
        """Rows at some indices, still unread."""
        return _Rows(self.dataset.select(indices), self.name, self.text_column)
