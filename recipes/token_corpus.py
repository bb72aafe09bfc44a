"""A tokenized corpus as one flat array on disk: many workers read it, none copies it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from litropy.recipes.chat import Encoder
from litropy.recipes.text_records import Documents, Kind, document_text

__all__ = ["TokenCorpus", "write_corpus"]

_CHUNK = 4 * 2**20  # characters that are tokenized at a time


class TokenCorpus:
    """Tokens of all documents, one after another, memory-mapped.

    ``tokens`` [sum of lengths] unsigned; ``offsets`` [documents + 1], document ``i`` is ``tokens[offsets[i] :
    offsets[i + 1]]``; ``targets`` [sum of lengths] bool, whether a token is to be learnt, or None if all are;
    ``unigram_entropy`` in nats.

    Args:
        folder: written by ``write_corpus``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = json.loads((folder / "meta.json").read_text())
        self.kind: Kind = meta["kind"]
        self.unigram_entropy: float = meta["unigram_entropy"]
        self.offsets: np.ndarray = np.load(folder / "offsets.npy")
        self.tokens: np.ndarray = _map(folder / "tokens.bin", meta["dtype"])
        targets = folder / "targets.bin"
        self.targets: np.ndarray | None = _map(targets, "bool") if targets.exists() else None

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenCorpus, (self.folder,)  # a pickled memory map would be a copy of the file

    def __len__(self) -> int:
        return len(self.offsets) - 1


def write_corpus(documents: Documents, tokenizer: Any, folder: Path) -> None:
    """Tokenize documents into an empty folder.

    Args:
        documents: of one kind.
        tokenizer: of Hugging Face.
        folder: for ``TokenCorpus`` to open.
    """
    vocab_size = len(tokenizer)
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    encode = Encoder(tokenizer, documents.kind)
    counts = np.zeros(vocab_size, dtype=np.int64)
    lengths = [0]
    with open(folder / "tokens.bin", "wb") as tokens_file, open(folder / "targets.bin", "wb") as targets_file:
        for chunk in _chunks(documents):
            for ids, targets in encode(chunk):
                ids.astype(dtype).tofile(tokens_file)
                lengths.append(len(ids))
                learnt = ids[1:]  # nothing predicts a document's first token
                if targets is not None:
                    targets.tofile(targets_file)
                    learnt = learnt[targets[1:]]
                counts += np.bincount(learnt, minlength=vocab_size)
    if documents.kind == "text":
        (folder / "targets.bin").unlink()
    np.save(folder / "offsets.npy", np.cumsum(lengths, dtype=np.int64))
    meta = {"kind": documents.kind, "dtype": dtype.name, "unigram_entropy": entropy(counts)}
    (folder / "meta.json").write_text(json.dumps(meta))


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that counts describe; 0 without any.

    Example::

        >>> round(entropy(np.array([2, 2, 0])), 4)
        0.6931
    """
    seen = counts[counts > 0]
    share = seen / max(seen.sum(), 1)
    return float(-(share * np.log(share)).sum())


def _map(path: Path, dtype: str) -> np.ndarray:
    if not path.stat().st_size:  # which cannot be mapped
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _chunks(documents: Documents) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    size = 0
    for item in documents.items:
        text = document_text(documents.kind, item)
        if not text.strip():
            continue
        chunk.append(item)
        size += len(text)
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
