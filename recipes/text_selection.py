"""Which documents are for training, validation and test."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litropy.recipes.hub_dataset import dataset_documents, head, open_dataset
from litropy.recipes.text_records import Documents
from litropy.recipes.text_sources import fingerprint, read_sources
from litropy.recipes.text_split import hold_out, split_stream_head, take

__all__ = ["TextSelection"]

_HEAD_DOCUMENTS = 10_000
_HEAD_MEBIBYTES = 16.0


@dataclass
class TextSelection:
    """The options of ``TextDataModule`` that decide on documents, and what follows from them.

    ``settings`` identifies a part (train, val or test) without reading it, ``documents`` reads it.
    """

    source: list[str]
    val_source: list[str]
    test_source: list[str]
    dataset: str | None
    dataset_config: str | None
    dataset_split: str
    dataset_val_split: str | None
    streaming: bool
    text_column: str
    max_documents: int | None
    max_mebibytes: float | None
    val_fraction: float
    seed: int
    _split: tuple[Documents, Documents] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.streaming and self.dataset is None:
            raise ValueError("`streaming: true` needs a `dataset`; files of `source` are read as they are.")
        if self.dataset_val_split and self.dataset is None:
            raise ValueError("`dataset_val_split` needs a `dataset`; for files there is `val_source`.")

    @property
    def held_out(self) -> float:
        """Share of the documents that is held out for validation."""
        return 0.0 if self.val_source or self.dataset_val_split else self.val_fraction

    def own_source(self, name: str) -> list[str]:
        """Files that only this part is read from."""
        return {"val": self.val_source, "test": self.test_source}.get(name, [])

    def settings(self, name: str) -> dict[str, Any]:
        """Everything that a part's documents depend on."""
        if own := self.own_source(name):
            return {"files": fingerprint(own), "text_column": self.text_column}
        return {
            "files": self._fingerprint(name),
            "kinds": [source for source in self.source if source.startswith("stdlib")],
            "dataset": [self.dataset, self.dataset_config, self.dataset_split, self.dataset_val_split, self.streaming],
            "text_column": self.text_column,
            "subset": [self.max_documents, self.max_mebibytes, self.seed],
            "held_out": self.held_out,
        }

    def _fingerprint(self, name: str) -> Any:
        if self.dataset is None:
            return fingerprint(self.source)
        if Path(self.dataset).is_dir():
            return fingerprint([self.dataset])
        return None if self.streaming else getattr(self.stream(self._split_name(name)), "_fingerprint", None)

    def _split_name(self, name: str) -> str:
        return self.dataset_val_split if name == "val" and self.dataset_val_split else self.dataset_split

    def stream(self, split: str | None = None) -> Any:
        """The dataset, which is a stream if ``streaming``."""
        assert self.dataset is not None
        return open_dataset(self.dataset, self.dataset_config, split or self.dataset_split, self.streaming)

    def documents(self, name: str) -> Documents:
        """Read a part: ``train``, ``val`` or ``test``; of a stream, what its beginning has of it."""
        if own := self.own_source(name):
            return read_sources(own, self.text_column)
        if name == "val" and self.dataset_val_split:
            return self._read(self.dataset_val_split)
        if self._split is None:
            everything = self._read(self.dataset_split)
            if self.streaming:
                self._split = split_stream_head(everything, self.held_out)
            else:
                chosen = take(everything, self.seed, self.max_documents, self.max_mebibytes)
                self._split = hold_out(chosen, self.seed, self.held_out)
        return self._split[name == "val"]

    def _read(self, split: str) -> Documents:
        if self.dataset is None:
            return read_sources(self.source, self.text_column)
        if not self.streaming:
            return dataset_documents(self.stream(split), self.dataset, self.text_column)
        characters = int((self.max_mebibytes or _HEAD_MEBIBYTES) * 2**20)
        return head(
            self.stream(split), self.dataset, self.text_column, self.max_documents or _HEAD_DOCUMENTS, characters
        )

    def forget(self) -> None:
        """Free the documents that were read."""
        self._split = None
