"""Loader of a stream that Lightning saves and restores."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from litropy.recipes.text_stream import PackedStream

__all__ = ["StreamLoader"]


class StreamLoader:
    """Gives out a stream's batches, and knows the place after the last of them.

    It has a length, the batches of the whole run, because Lightning asks a loader without one for a batch too many.

    Args:
        stream: what this rank reads.
        length: batches until the end of training, or of an epoch.
        num_workers: processes that read and pack ahead; 0 does it in the main process.
        mask: keep the attention mask in the batches.
    """

    def __init__(self, stream: PackedStream, length: int, num_workers: int, mask: bool) -> None:
        self._stream = stream
        self._length = length
        self._num_workers = num_workers
        self._mask = mask

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Go on after the last batch; nothing happens before the first is asked for."""
        loader: DataLoader[Any] = DataLoader(
            self._stream,
            batch_size=None,
            num_workers=self._num_workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # keeps its hands off the global random state
        )
        # the loader has its own copy or iterator of the states by now, or takes it with the first batch
        for item in loader:
            if not item:
                continue
            self._stream.states = {**self._stream.states, item["worker"]: item["state"]}
            self._stream.last_worker = item["worker"]
            names = [name for name in item["batch"] if self._mask or name != "attention_mask"]
            yield {name: torch.from_numpy(item["batch"][name]) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Places of all ranks and workers; every rank must call this."""
        own = {
            "states": self._stream.states,
            "last_worker": self._stream.last_worker,
            "num_workers": self._num_workers,
        }
        ranks = [own]
        if dist.is_available() and dist.is_initialized():
            ranks = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(ranks, own)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's place.

        Raises:
            ValueError: if the number of ranks or workers is not that of the checkpoint.
        """
        ranks = state_dict.get("ranks", [])
        now = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if len(ranks) != now:
            raise ValueError(
                f"The checkpoint has the place in the stream for {len(ranks)} ranks, and this run has {now}: resume it"
                " on as many."
            )
        own = ranks[dist.get_rank() if now > 1 else 0]
        if own["num_workers"] != self._num_workers:
            raise ValueError(
                f"The checkpoint's stream was read by {own['num_workers']} workers per device; set"
                f" `num_workers: {own['num_workers']}` to resume it (it is {self._num_workers})."
            )
        self._stream.states = own["states"]
        self._stream.last_worker = own["last_worker"]


def _as_it_is(item: Any) -> Any:
    return item
