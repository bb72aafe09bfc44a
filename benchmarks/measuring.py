"""How time, peak memory and gradient error are measured, on a CPU or a GPU."""

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

MIB = 2**20


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved_times(
    steps: Mapping[str, Callable[[], object]], rounds: int, device: str, patience: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of each step in each round; rounds are interleaved, so that a noisy moment hits everyone alike.

    Args:
        steps: what to time, by name.
        rounds: how often.
        device: where it runs.
        patience: seconds after which three rounds have to do.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begin > patience:
            break
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    return times


def summary_ms(seconds: list[float]) -> dict[str, float]:
    """Median and minimum in milliseconds."""
    return {
        "median_ms": round(1e3 * statistics.median(seconds), 3),
        "min_ms": round(1e3 * min(seconds), 3),
    }


def _status_kib(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


def watch_peak(device: str) -> Callable[[], int]:
    """Watch memory from now on; what this returns says how many bytes it has risen above its present level at most.

    On a CPU: this process's resident set (Linux only).
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()

        def risen() -> int:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - allocated

        return risen
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM
    before = _status_kib("VmRSS")
    return lambda: 1024 * (_status_kib("VmHWM") - before)


def peak_extra_bytes(run: Callable[[], object], device: str) -> int:
    """How far memory rises above its level before ``run``."""
    risen = watch_peak(device)
    run()
    return risen()


def true_gradients(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[float, Tensor, Tensor]:
    """Mean loss and its gradients in float64, a few rows at a time."""
    h, w = hidden.detach().double(), weight.detach().double()
    d_hidden, d_weight, loss = torch.empty_like(h), torch.zeros_like(w), 0.0
    step = max(1, 256 * MIB // (8 * w.shape[0]))
    for start in range(0, len(h), step):
        rows = slice(start, start + step)
        log_p = (h[rows] @ w.T).log_softmax(-1)
        loss -= log_p.gather(1, target[rows, None]).sum().item() / len(h)
        dz = log_p.exp_()
        dz.scatter_add_(1, target[rows, None], dz.new_full((len(dz), 1), -1.0))
        dz /= len(h)
        d_hidden[rows] = dz @ w
        d_weight.addmm_(dz.T, h[rows])
    return loss, d_hidden, d_weight


def relative_error(got: Tensor, truth: Tensor) -> float:
    """``|got - truth| / |truth|`` in the Frobenius norm, a few rows at a time."""
    squares = 0.0
    for start in range(0, len(truth), 8192):
        rows = slice(start, start + 8192)
        squares += (got[rows].double() - truth[rows]).square().sum().item()
    return squares**0.5 / truth.norm().item()


def largest_error(got: Tensor, truth: Tensor) -> float:
    """``max |got - truth|``, a few rows at a time."""
    return max(
        (got[start : start + 8192].double() - truth[start : start + 8192]).abs().max().item()
        for start in range(0, len(truth), 8192)
    )
