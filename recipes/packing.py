"""Lay documents out in windows of fixed length, and gather windows into batches.

A window is a list of spans of the flat corpus; how spans are laid out is the only difference between the layouts.
"""

from dataclasses import dataclass

import numpy as np

from litropy.recipes.target_rows import target_rows

__all__ = ["Windows", "best_fit", "concatenate", "gather", "one_per_window"]


@dataclass(frozen=True)
class Windows:
    """Which spans of the corpus each window holds, one after another.

    Args:
        length: tokens in a window, T.
        first_span: [windows + 1], window ``w`` holds the spans ``first_span[w] : first_span[w + 1]``.
        begin: [spans], where a span begins in the corpus.
        size: [spans], tokens in it; at most T in all for a window.
        truncated: documents that lost their end because they are longer than a window.
    """

    length: int
    first_span: np.ndarray
    begin: np.ndarray
    size: np.ndarray
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.first_span) - 1


def concatenate(offsets: np.ndarray, order: np.ndarray, length: int) -> Windows:
    """Put all documents in a row and cut it every ``length`` tokens; only the last window may have room left.

    Args:
        offsets: [documents + 1], where documents begin in the corpus.
        order: indices of the documents, in the order of the row.
        length: tokens in a window.
    """
    sizes = np.diff(offsets)[order]
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.arange(0, total, length)
    borders = np.union1d(np.append(ends, 0), cuts)
    begin, size = borders[:-1], np.diff(borders)
    document = np.searchsorted(ends, begin, side="right")
    in_corpus = offsets[order[document]] + begin - (ends - sizes)[document]
    return Windows(length, np.searchsorted(begin // length, np.arange(len(cuts) + 1)), in_corpus, size)


def best_fit(offsets: np.ndarray, order: np.ndarray, length: int) -> Windows:
    """Put each document, whole, into the window where it leaves the least room; longer ones lose their end.

    Args:
        offsets: [documents + 1], where documents begin in the corpus.
        order: indices of the documents, in which they are placed.
        length: tokens in a window.
    """
    sizes = np.diff(offsets)[order]
    fitted = np.minimum(sizes, length)
    open_windows: list[list[int]] = [[] for _ in range(length + 1)]  # by room
    rooms = 0  # bit r is set if a window with room r is open
    window_of = np.empty(len(order), dtype=np.int64)
    count = 0
    for index, size in enumerate(fitted.tolist()):
        enough = rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1  # the smallest that is enough
            window = open_windows[room].pop()
            if not open_windows[room]:
                rooms ^= 1 << room
        else:
            room, window, count = length, count, count + 1
        window_of[index] = window
        if room > size:
            open_windows[room - size].append(window)
            rooms |= 1 << (room - size)
    by_window = np.argsort(window_of, kind="stable")
    first_span = np.searchsorted(window_of[by_window], np.arange(count + 1))
    truncated = int((sizes > length).sum())
    return Windows(length, first_span, offsets[order][by_window], fitted[by_window], truncated)


def one_per_window(offsets: np.ndarray, order: np.ndarray, length: int, cut: bool) -> Windows:
    """Give each document windows of its own.

    Args:
        offsets: [documents + 1], where documents begin in the corpus.
        order: indices of the documents, in the order of the windows.
        length: tokens in a window.
        cut: continue a longer document in the next window; else it loses its end.
    """
    sizes = np.diff(offsets)[order]
    pieces = -(-sizes // length) if cut else np.ones_like(sizes)
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # of a piece in its document
    begin = np.repeat(offsets[order], pieces) + number * length
    size = np.minimum(np.repeat(sizes, pieces) - number * length, length)
    truncated = 0 if cut else int((sizes > length).sum())
    return Windows(length, np.arange(len(begin) + 1), begin, size, truncated)


def gather(
    windows: Windows, rows: np.ndarray, tokens: np.ndarray, targets: np.ndarray | None, pad: int
) -> dict[str, np.ndarray]:
    """Gather windows into a batch.

    Positions restart at 0 at each span, by which models tell packed documents apart. Labels are the ids, and -100 at
    each span's first token, which nothing in the window predicts, at padding, and where ``targets`` says so.

    Args:
        windows: the layout.
        rows: [B] indices of windows; -1 for a row of padding.
        tokens: the flat corpus.
        targets: whether each of its tokens is to be learnt; None if all are.
        pad: id that fills what is left of a window.

    Returns:
        ``input_ids``, ``labels`` and ``position_ids`` [B, T] int64, ``attention_mask`` [B, T] int64 (0 at padding), and
        where many positions have no target, ``target_rows`` [n] int64: those that have.
    """
    shape = (len(rows), windows.length)
    first = windows.first_span[rows]
    count = np.where(rows < 0, 0, windows.first_span[rows + 1] - first)
    span = _ranges(first, count)
    size = windows.size[span]
    column = _ranges(np.zeros_like(size), size)  # position inside a span
    source = np.repeat(windows.begin[span], size) + column
    filled = np.bincount(np.repeat(np.arange(len(rows)), count), weights=size, minlength=len(rows)).astype(np.int64)
    place = _ranges(np.arange(len(rows)) * windows.length, filled)

    ids = np.full(shape, pad, dtype=np.int64)
    labels = np.full(shape, -100, dtype=np.int64)
    positions = np.arange(windows.length) - filled[:, None]  # padding counts from 0 as well: a document of its own
    found = tokens[source].astype(np.int64)
    learnt = column > 0 if targets is None else (column > 0) & targets[source]
    ids.flat[place] = found
    labels.flat[place] = np.where(learnt, found, -100)
    positions.flat[place] = column
    mask = (np.arange(windows.length) < filled[:, None]).astype(np.int64)
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": mask}
    wanted = target_rows(labels)
    return batch if wanted is None else batch | {"target_rows": wanted}


def _ranges(begin: np.ndarray, count: np.ndarray) -> np.ndarray:
    """``begin[i], begin[i] + 1, ...``, ``count[i]`` of them, one range after another.

    Example::

        >>> _ranges(np.array([5, 0]), np.array([2, 3])).tolist()
        [5, 6, 0, 1, 2]
    """
    total = int(count.sum())
    return np.arange(total) + np.repeat(begin - (np.cumsum(count) - count), count)
