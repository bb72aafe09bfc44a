"""How long a monitor's own work takes, without waiting for the device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["ProbeClock"]


class ProbeClock:
    """Adds up the time of pieces of work: of the device's stream on CUDA, else the wall clock's.

    Args:
        device: where the work runs.

    Example::

        >>> clock = ProbeClock(torch.device("cpu"))
        >>> clock.take() is None
        True
        >>> with clock.running():
        ...     _ = torch.ones(3).sum()
        >>> clock.take() > 0
        True
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._open: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._ms: float | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure a piece of work."""
        if self._on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._open.append((start, end))
        else:
            begin = time.perf_counter()
            yield
            self._ms = (self._ms or 0.0) + 1e3 * (time.perf_counter() - begin)

    def take(self) -> float | None:
        """Time in ms of the work that has ended since the last call, None if there is none; what still runs stays."""
        while self._open and self._open[0][1].query():
            start, end = self._open.pop(0)
            self._ms = (self._ms or 0.0) + start.elapsed_time(end)
        taken, self._ms = self._ms, None
        return taken
