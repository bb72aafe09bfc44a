"""Batches in an order that follows from seed and epoch alone, so that a position in it is all there is to resume."""

import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

__all__ = ["ResumableLoader", "eval_batches", "position_of", "rank_of", "shuffled_batches"]

Batch = dict[str, torch.Tensor]


def shuffled_batches(num_items: int, batch_size: int, rank: int, ranks: int, seed: int, epoch: int) -> np.ndarray:
    """One rank's share of an epoch: items are shuffled, and each global batch is divided among the ranks.

    The global batches depend on ``batch_size * ranks`` only. What does not fill a global batch is left out; because of
    the shuffling that is something else in each epoch.

    Args:
        num_items: items in the data.
        batch_size: of one rank.
        rank: which one.
        ranks: how many.
        seed: of the order.
        epoch: from 0.

    Returns:
        [batches, batch_size] indices.

    Example::

        >>> shuffled_batches(5, batch_size=1, rank=1, ranks=2, seed=0, epoch=0).shape
        (2, 1)
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_items)
    count = num_items // (batch_size * ranks)
    return order[: count * ranks * batch_size].reshape(count, ranks, batch_size)[:, rank]


def eval_batches(num_items: int, batch_size: int, rank: int, ranks: int) -> list[np.ndarray]:
    """One rank's share of all items, in order, each once; as many rows as on the other ranks, filled up with -1.

    Args:
        num_items: items in the data.
        batch_size: of one rank.
        rank: which one.
        ranks: how many.

    Returns:
        Indices of each batch, -1 for an empty row.

    Example::

        >>> eval_batches(3, batch_size=2, rank=1, ranks=2)
        [array([ 2, -1])]
    """
    batches = []
    for start in range(0, num_items, batch_size * ranks):
        rows = -(-min(batch_size * ranks, num_items - start) // ranks)
        mine = np.arange(start + rank * rows, start + (rank + 1) * rows)
        batches.append(np.where(mine < num_items, mine, -1))
    return batches


class BatchDataset(Protocol):
    """Anything that makes a batch out of indices."""

    def __getitem__(self, rows: np.ndarray) -> Batch:
        """Make a batch."""
        ...


def rank_of(trainer: Any) -> tuple[int, int]:
    """Which share of the data this process has, of how many; the first of one without a trainer."""
    # the trainer knows which ranks see the same data, as under tensor parallelism
    options = (trainer.distributed_sampler_kwargs if trainer else None) or {}
    return options.get("rank", 0), options.get("num_replicas", 1)


def position_of(trainer: Any) -> tuple[int, int]:
    """The epoch that a trainer is in, and how many of its batches it has taken."""
    if trainer is None:
        return 0, 0
    done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return 0 if getattr(trainer, "overfit_batches", 0) else trainer.current_epoch, done


class ResumableLoader:
    """Loader whose place is known to the training loop, and not to itself.

    Worker processes run ahead of training, so a loader that counted what it has given out would resume too late. This
    one asks for epoch and position when an iteration begins. It has ``state_dict`` to recognise its data, for a
    checkpoint that is resumed on other data or another number of ranks.

    Args:
        dataset: makes batches.
        order: gives the batches' indices in an epoch; equally many in each.
        position: gives the current epoch, and how many of its batches have been trained on.
        num_workers: processes that make batches ahead; 0 makes them in the main process.
        identity: settings that decide the order.
    """

    def __init__(
        self,
        dataset: BatchDataset,
        order: Callable[[int], Any],
        position: Callable[[], tuple[int, int]] = lambda: (0, 0),
        num_workers: int = 0,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self._order = order
        self._position = position
        self._identity = identity or {}
        self._batches: Any = order(0)
        self._length = len(self._batches)
        if num_workers:  # which do not tokenize: nothing to warn about after a fork
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        data: Any = dataset
        self._loader: DataLoader[Batch] = DataLoader(
            data,
            batch_size=None,
            sampler=_Indices(self),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # keeps its hands off the global random state
        )

    def __len__(self) -> int:
        """Batches in an epoch, also when an epoch is resumed in its middle."""
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        """Go on from the training loop's position; nothing happens before the first batch is asked for."""
        epoch, start = self._position()
        self._batches = self._order(epoch)[start:]
        yield from self._loader

    def state_dict(self) -> dict[str, Any]:
        """What decides the order; the position itself is in the checkpoint already, in Lightning's progress."""
        return dict(self._identity)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warn if the checkpoint was written with another order."""
        changed = [
            f"{key} was {state_dict.get(key)!r} and is {value!r}"
            for key, value in self._identity.items()
            if state_dict.get(key) != value
        ]
        if changed:
            rank_zero_warn(
                f"The checkpoint was written with other data settings ({'; '.join(changed)}): training goes on,"
                " but some of this epoch's documents may come twice or not at all."
            )


class _Indices:
    """Sampler that reads a loader's current batches."""

    def __init__(self, loader: ResumableLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.loader._batches)

    def __len__(self) -> int:
        return len(self.loader._batches)
