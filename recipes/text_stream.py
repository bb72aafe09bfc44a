"""Pack a dataset while it is read, without end, and remember the place after every batch."""

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from litropy.recipes.chat import Encoder
from litropy.recipes.packing import Windows, gather
from litropy.recipes.text_records import Kind, document_text, parse_record
from litropy.recipes.text_split import is_held_out

__all__ = ["PackedStream"]

_BLOCK_DOCUMENTS = 1024
_BLOCK_CHARACTERS = 4 * 2**20

Layout = Callable[[np.ndarray, np.ndarray, int], Windows]
State = dict[str, Any]
_START: State = {"place": None, "pass": 0, "block": 0, "done": 0, "sizes": [], "tokens": None, "targets": None}


class PackedStream(IterableDataset[dict[str, Any]]):
    """Batches from a stream, each with the state after it; the stream starts anew when it ends.

    Blocks of documents are shuffled and packed; what does not fill a batch goes on to the next block. A state is the
    place where a block begins, what was left over from the one before, and how many of its batches are done.

    Args:
        stream: this rank's share of a streaming dataset.
        name: for errors.
        text_column: column with plain text.
        kind: of the documents.
        tokenizer: of Hugging Face.
        layout: packs documents, from offsets, order and window length.
        sequence_length: tokens in a window.
        batch_size: windows in a batch.
        held_out: share of the documents that is not trained on.
        seed: of the order inside a block.
    """

    def __init__(
        self,
        stream: Any,
        name: str,
        text_column: str,
        kind: Kind,
        tokenizer: Any,
        layout: Layout,
        sequence_length: int,
        batch_size: int,
        held_out: float,
        seed: int,
    ) -> None:
        self.stream = stream
        self.name = name
        self.text_column = text_column
        self.kind = kind
        self.tokenizer = tokenizer
        self.layout = layout
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.held_out = held_out
        self.seed = seed
        self.states: dict[int, State] = {}  # where each worker begins
        self.last_worker = -1  # whose batch was the last

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield dicts of ``batch``, ``worker`` and ``state``.

        Workers take turns. To begin after ``last_worker``, those up to it give up their first turn with an empty dict.
        """
        info = get_worker_info()
        worker = info.id if info else 0
        if info:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads and forks do not mix; the workers are parallel
        if info and worker <= self.last_worker:
            yield {}
        for batch, state in self._batches(self.states.get(worker, _START)):
            yield {"batch": batch, "worker": worker, "state": state}

    def _batches(self, state: State) -> Iterator[tuple[dict[str, np.ndarray], State]]:
        encode = Encoder(self.tokenizer, self.kind)
        documents = _Reader(self, state["place"])
        while True:
            block = documents.block()
            order = np.random.default_rng([self.seed, 4, state["pass"], state["block"]]).permutation(len(block))
            encoded = _unpack(state) + list(encode([block[index] for index in order]))
            sizes = [len(ids) for ids, _ in encoded]
            tokens = np.concatenate([ids for ids, _ in encoded] or [np.zeros(0, np.int64)])
            targets = None if self.kind == "text" else np.concatenate([mask for _, mask in encoded if mask is not None])
            windows = self.layout(np.cumsum([0, *sizes]), np.arange(len(sizes)), self.sequence_length)
            count = max(len(windows) - 1, 0) // self.batch_size  # the last window may not be full yet
            for number in range(state["done"], count):
                rows = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
                batch = gather(windows, rows, tokens, targets, self.tokenizer.pad_token_id)
                yield batch, {**state, "done": number + 1}
            state = {
                "place": documents.place(),
                "pass": state["pass"] + documents.ended,
                "block": 0 if documents.ended else state["block"] + 1,
                "done": 0,
                **_pack(windows, count * self.batch_size, tokens, targets),
            }
            if documents.ended:
                documents = _Reader(self, None)


class _Reader:
    """Reads blocks of documents that are not held out, up to the end of the stream."""

    def __init__(self, source: PackedStream, place: Any) -> None:
        self.source = source
        self.stream = copy.deepcopy(source.stream)
        if place is not None:
            self.stream.load_state_dict(place)
        self.ended = False
        self.empty = place is None
        self.rows = iter(self.stream)

    def block(self) -> list[Any]:
        source = self.source
        items: list[Any] = []
        characters = 0
        while len(items) < _BLOCK_DOCUMENTS and characters < _BLOCK_CHARACTERS:
            try:
                row = next(self.rows)
            except StopIteration:
                self.ended = True
                break
            kind, item = parse_record(row, f"{source.name}, a row of the stream", source.text_column)
            if kind != source.kind:
                raise ValueError(f"{source.name}: records of {source.kind} and of {kind} are mixed; stream one kind.")
            text = document_text(kind, item)
            if text.strip() and not is_held_out(kind, item, source.held_out):
                items.append(item)
                characters += len(text)
        if self.ended and self.empty and not items:
            raise ValueError(f"{source.name}: the stream has no text to train on.")
        self.empty = self.empty and not items
        return items

    def place(self) -> Any:
        return None if self.ended else self.stream.state_dict()


def _pack(windows: Windows, first: int, tokens: np.ndarray, targets: np.ndarray | None) -> State:
    """What is in the windows from ``first`` on, as tensors and numbers, which any checkpoint can hold."""
    spans = range(int(windows.first_span[first]), len(windows.begin)) if len(windows) else range(0)
    places = [slice(int(windows.begin[span]), int(windows.begin[span] + windows.size[span])) for span in spans]
    source = np.concatenate([np.arange(place.start, place.stop) for place in places] or [np.zeros(0, np.int64)])
    return {
        "sizes": [place.stop - place.start for place in places],
        "tokens": torch.from_numpy(tokens[source]),
        "targets": None if targets is None else torch.from_numpy(targets[source]),
    }


def _unpack(state: State) -> list[tuple[np.ndarray, np.ndarray | None]]:
    if not state["sizes"]:
        return []
    cuts = np.cumsum(state["sizes"])[:-1]
    tokens = np.split(state["tokens"].numpy(), cuts)
    masks = [None] * len(tokens) if state["targets"] is None else np.split(state["targets"].numpy(), cuts)
    return list(zip(tokens, masks, strict=True))
