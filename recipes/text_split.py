"""Take a subset of documents, and hold some of them out; the seed alone decides which."""

import zlib
from typing import Any

import numpy as np

from litropy.recipes.text_records import Documents, Kind, document_text

__all__ = ["hold_out", "is_held_out", "split_stream_head", "take"]

_MEBIBYTE = 2**20


def take(documents: Documents, seed: int, max_documents: int | None, max_mebibytes: float | None) -> Documents:
    """Take a random subset, in random order; all documents in their order if there is no limit.

    Args:
        documents: to choose from.
        seed: of the choice.
        max_documents: how many at most.
        max_mebibytes: how much text at most, in MiB of UTF-8; the last document, if it is text, is cut to fit.

    Raises:
        ValueError: if a limit is not positive, or leaves nothing.
    """
    for name, limit in (("max_documents", max_documents), ("max_mebibytes", max_mebibytes)):
        if limit is not None and limit <= 0:
            raise ValueError(f"`{name}` is {limit}; it must be positive, or null for no limit.")
    if max_documents is None and max_mebibytes is None:
        return documents
    order = np.random.default_rng([seed, 1]).permutation(len(documents))[:max_documents]
    if max_mebibytes is None:
        return _select(documents, order)
    room = int(max_mebibytes * _MEBIBYTE)
    items: list[Any] = []
    for index in order.tolist():
        item = documents.items[index]
        text = document_text(documents.kind, item).encode()
        if len(text) > room:
            if documents.kind == "text" and room:
                items.append(text[:room].decode(errors="ignore"))
            break
        items.append(item)
        room -= len(text)
    if not items:
        raise ValueError(f"`max_mebibytes` is {max_mebibytes}, which is less than one record; raise it.")
    return Documents(documents.kind, items)


def hold_out(documents: Documents, seed: int, fraction: float) -> tuple[Documents, Documents]:
    """Split documents at random into those to train on and those held out.

    A single text is cut in two at a line's end instead, and its end held out.

    Args:
        documents: to split.
        seed: of the split.
        fraction: share of the documents to hold out, at least one; from 0 to below 1.

    Returns:
        Training documents and held-out documents.

    Raises:
        ValueError: if the fraction is out of range, or there is nothing to hold out.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"`val_fraction` is {fraction}; it must be at least 0 and below 1.")
    if fraction == 0:
        return documents, Documents(documents.kind, [])
    if len(documents) == 1 and documents.kind == "text":
        text = documents.items[0]
        cut = text.rfind("\n", 0, int(len(text) * (1 - fraction))) + 1
        if cut:
            return Documents("text", [text[:cut]]), Documents("text", [text[cut:]])
    if len(documents) < 2:
        raise ValueError(
            "There is one document only, so none is left for validation; give more, or `val_source`, or"
            " `val_fraction: 0`."
        )
    count = min(max(1, round(fraction * len(documents))), len(documents) - 1)
    order = np.random.default_rng([seed, 2]).permutation(len(documents))
    return _select(documents, np.sort(order[count:])), _select(documents, np.sort(order[:count]))


def is_held_out(kind: Kind, item: Any, fraction: float) -> bool:
    """Whether a document of a stream is held out; its text alone decides, wherever and whenever it is read."""
    return zlib.crc32(document_text(kind, item).encode()) < fraction * 2**32


def split_stream_head(documents: Documents, fraction: float) -> tuple[Documents, Documents]:
    """Split the first documents of a stream into those to train on and those held out.

    Raises:
        ValueError: if there are too few to hold one out.
    """
    parts: tuple[list[Any], list[Any]] = [], []
    for item in documents.items:
        parts[is_held_out(documents.kind, item, fraction)].append(item)
    if not parts[0] or (fraction and not parts[1]):
        raise ValueError(
            f"The first {len(documents)} documents of the stream cannot be split for validation; raise `max_documents`"
            " or `val_fraction`, or set `dataset_val_split`."
        )
    return Documents(documents.kind, parts[0]), Documents(documents.kind, parts[1])


def _select(documents: Documents, indices: np.ndarray) -> Documents:
    select = getattr(documents.items, "select", None)  # rows of a dataset stay where they are
    items = select(indices) if select else [documents.items[index] for index in indices.tolist()]
    return Documents(documents.kind, items)
