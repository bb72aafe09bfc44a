"""Numbers on their way from the device to the collapse rules: many steps in one copy that nobody waits for."""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from litropy.callbacks.collapse_readings import Readings

__all__ = ["Arrived", "Inbox"]


class Arrived(NamedTuple):
    """Numbers of one step on the host: its loss, or a probe."""

    step: int
    loss: float | None
    values: dict[str, np.ndarray]
    layers: tuple[int | str, ...]


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Inbox:
    """Gathers losses and probes on the device, and brings them to the host together.

    Losses are averaged over the ranks that have one, and what arrives is the first rank's copy, so every rank gets the
    same numbers.

    Example::

        >>> inbox = Inbox()
        >>> inbox.add_loss(0, torch.tensor(2.0))
        >>> inbox.add(Readings(0, {"output/entropy": torch.tensor(1.5)}))
        >>> inbox.send(torch.device("cpu"))
        >>> [(item.step, item.loss, {**item.values}) for item in inbox.receive()]
        [(0, 2.0, {}), (0, None, {'output/entropy': array(1.5, dtype=float32)})]
    """

    def __init__(self) -> None:
        self._losses: list[tuple[int, Tensor | None]] = []
        self._means: list[tuple[int, Tensor]] = []
        self._probes: list[Readings] = []
        self._sent: tuple[list[tuple[int, Tensor]], list[Readings], Tensor, Any] | None = None
        self._device = torch.device("cpu")

    def add_loss(self, step: int, loss: Tensor | None) -> None:
        """Take a step's loss, a scalar on the device that is not changed afterwards; None if this rank has none."""
        self._losses.append((step, None if loss is None else loss.detach().float()))
        self._device = self._device if loss is None else loss.device

    def add(self, readings: Readings) -> None:
        """Take a probe."""
        self._probes.append(readings)

    def _average(self) -> None:
        """Average losses over ranks; every rank calls this at the same steps."""
        if not self._losses:
            return
        zero = torch.zeros((), device=self._device)
        sums = torch.stack([zero if loss is None else loss.to(zero.device) for _, loss in self._losses])
        counts = torch.tensor([float(loss is not None) for _, loss in self._losses]).to(zero.device)
        if _ranks() > 1:
            both = torch.stack([sums, counts])
            dist.all_reduce(both)
            sums, counts = both.unbind()
        # a mean, and whether there is one
        means = torch.stack([sums / counts.clamp(min=1), (counts > 0).float()], dim=1)
        self._means += [(step, mean) for (step, _), mean in zip(self._losses, means.unbind(), strict=True)]
        self._losses = []

    def send(self, device: torch.device) -> None:
        """Start the copy of everything that is there, unless an earlier one has not been received yet.

        Args:
            device: where the numbers are, and where ranks exchange them.
        """
        self._device = device
        if self._sent is not None:
            return
        self._average()
        tensors = [mean for _, mean in self._means]
        tensors += [value for probe in self._probes for value in probe.values.values()]
        if not tensors:
            return
        flat = torch.cat([tensor.detach().to(device, torch.float32).flatten() for tensor in tensors])
        if _ranks() > 1:
            # monitors may have rounded differently on each rank
            dist.broadcast(flat, 0)
        event = None
        if flat.is_cuda:
            host = torch.empty(flat.shape, pin_memory=True).copy_(flat, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            host = flat.cpu()
        self._sent = (self._means, self._probes, host, event)
        self._means, self._probes = [], []

    def receive(self) -> list[Arrived]:
        """Return what has been sent, in the order of steps, each step's loss first; empty if nothing was sent."""
        if self._sent is None:
            return []
        means, probes, host, event = self._sent
        self._sent = None
        if event is not None:
            event.synchronize()
        numbers = host.numpy()
        losses = numbers[: 2 * len(means)].reshape(-1, 2)
        found = [
            Arrived(step, float(mean), {}, ()) for (step, _), (mean, known) in zip(means, losses, strict=True) if known
        ]
        start = losses.size
        for probe in probes:
            values = {}
            for name, tensor in probe.values.items():
                values[name] = numbers[start : start + tensor.numel()].reshape(tensor.shape)
                start += tensor.numel()
            found.append(Arrived(probe.step, None, values, probe.layers))
        return sorted(found, key=lambda item: (item.step, item.loss is None))

    def state_dict(self) -> dict[str, Any]:
        """What has not been received yet, as plain lists; every rank must call this."""
        self._average()
        means, probes = (self._sent[0], self._sent[1]) if self._sent is not None else ([], [])
        return {
            "losses": [[step, mean.tolist()] for step, mean in means + self._means],
            "probes": [
                [probe.step, {name: value.tolist() for name, value in probe.values.items()}, list(probe.layers)]
                for probe in probes + self._probes
            ],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        self._sent = None
        self._losses = []
        self._means = [(step, torch.tensor(mean)) for step, mean in state_dict["losses"]]
        self._probes = [
            Readings(step, {name: torch.tensor(value) for name, value in values.items()}, tuple(layers))
            for step, values, layers in state_dict["probes"]
        ]
