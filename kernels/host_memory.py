"""Memory on the host for much at once.

A system hands out memory in pages of 4 KiB and clears each when it is first touched, which takes longer than merging
the planes that are written there. In pages of 2 MiB, where the system has them on request, it takes an eighth of that.
"""

import ctypes
import functools
import mmap
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Rooms", "empty"]

# below this there may be no whole large page to ask for
_LEAST_BYTES = 4 << 20


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """``torch.empty``, in large pages where that pays and the system offers them.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        device: where it is; the pages of others than a CPU are not ours to choose.

    Returns:
        A tensor whose values are anything.

    Example:
        >>> empty((2, 3), torch.bfloat16).shape
        torch.Size([2, 3])
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    advise = _madvise()
    if advise is not None and tensor.device.type == "cpu" and tensor.nbytes >= _LEAST_BYTES:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        # advice: where it is not taken, the pages stay small
        advise(start, length, mmap.MADV_HUGEPAGE)
    return tensor


class Rooms:
    """Memory that threads take and give back, so that little of it is ever new.

    Example:
        >>> rooms = Rooms()
        >>> room = rooms.take(1000)
        >>> rooms.give(room)
        >>> rooms.take(500) is room
        True
    """

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """At least so many bytes, whose values are anything."""
        try:
            room = self._free.pop()
        except IndexError:
            room = np.empty(0, np.uint8)
        return room if room.size >= nbytes else np.empty(nbytes, np.uint8)

    def give(self, room: NDArray[np.uint8]) -> None:
        """What was taken, and is needed no more."""
        self._free.append(room)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The system's call, or None where there is none or no large pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes, call.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    advise: Callable[[int, int, int], int] = call
    return advise
