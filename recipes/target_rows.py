"""Which of a batch's positions the output head has to see, found out where labels are made: on the CPU."""

import numpy as np
from torch import Tensor

__all__ = ["check_target_rows", "target_rows"]

# rows of a kernel's tile: filling one up costs nothing, and batches come in few shapes
_MULTIPLE = 128
# a batch with a larger share of targets is used whole: copying its rows would cost about what it saves
_MOST = 7 / 8


def target_rows(labels: np.ndarray) -> np.ndarray | None:
    """Places, in the flat batch, of the positions that predict a target.

    Looking for them on a GPU would make the training loop wait for it. They are filled up to a multiple of 128 with a
    place that predicts nothing, the last of the first row.

    Args:
        labels: int64 [B, T], aligned with the input ids; -100 is no target.

    Returns:
        int64 [n], ascending but for the filling; None if more than seven eighths of the positions would be named.

    Example::

        >>> labels = np.full((2, 512), -100)
        >>> labels[1, 500:] = 7
        >>> rows = target_rows(labels)
        >>> rows.shape, rows[[0, 11, 12, -1]].tolist()
        ((128,), [1011, 1022, 511, 511])
    """
    predicts = np.zeros(labels.shape, dtype=bool)
    predicts[:, :-1] = labels[:, 1:] != -100
    rows = np.flatnonzero(predicts)
    filled = max(1, -(-len(rows) // _MULTIPLE)) * _MULTIPLE
    if filled > _MOST * labels.size:
        return None
    return np.pad(rows, (0, filled - len(rows)), constant_values=labels.shape[1] - 1)


def check_target_rows(rows: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless ``rows`` [n] names every target of ``targets`` [B, T] once; waits for the device."""
    flat = targets.flatten()
    left = flat.index_fill(0, rows, -100) != -100
    named, there = flat[rows] != -100, flat != -100
    if bool(left.any()) or int(named.sum()) != int(there.sum()):
        raise ValueError(
            f"The batch's `target_rows` name {int(named.sum())} targets, and its `labels` have {int(there.sum())}, of"
            f" which {int(left.sum())} are not named. What changes labels must make them anew"
            " (litropy.recipes.target_rows), or delete them from the batch: then the head sees every position."
        )
