"""Collects the output distribution's sums of one optimiser step, from wherever its logits pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from litropy.callbacks.output_entropy import (
    OutputSums,
    choose_tokens,
    exact_sums,
    logit_statistics,
    sampled_sums,
    top_sums,
)
from litropy.callbacks.output_entropy_logits import HeadPlace, LogitTap
from litropy.callbacks.probe_clock import ProbeClock
from litropy.losses import linear_head_stats
from litropy.losses.head_passes import HeadPass, watch_head_passes

__all__ = ["OutputProbe", "rows_of"]

_IN_THE_SAME_PASS = ("entropy", "varentropy", "lse", "max_logprob", "logprob")
_OF_A_SAMPLE: Any = ("topk_entropy", "topk_mass")
# tokens that pass the head again even in a small batch; of a larger one a quarter at most
_FEW = 128


class OutputProbe:
    """Watches passes through the head, and logits that a model computes itself, while it is open.

    Args:
        places: output heads whose logits to watch for.
        device: where the model is.
        top_k: how many likeliest entries the top-k statistics take.
        temperature: what logits that a model computes itself are divided by.
        is_training: whether a pass that happens now is part of the training step.

    Attributes:
        has_targets: whether a pass had targets so far.
    """

    def __init__(
        self,
        places: Sequence[HeadPlace],
        device: torch.device,
        top_k: int,
        temperature: float,
        is_training: Callable[[], bool],
    ) -> None:
        self.top_k = top_k
        self.temperature = temperature
        self.is_training = is_training
        self.clock = ProbeClock(device)
        self.has_targets = False
        self.sums: OutputSums | None = None
        self.taps = [LogitTap(place, self._see_logits) for place in places]
        self._rows = 0
        self._generator = torch.Generator(device)

    @contextmanager
    def open(self, rows: int, seed: int) -> Iterator[None]:
        """Watch.

        Args:
            rows: tokens that are sampled from each pass.
            seed: of the sample; the global random state stays as it is.
        """
        self._rows = rows
        self._generator.manual_seed(seed)
        with ExitStack() as stack:
            stack.enter_context(watch_head_passes(self._see_pass, _IN_THE_SAME_PASS))
            for tap in self.taps:
                stack.enter_context(tap.installed(self.is_training))
            yield

    def flush(self) -> None:
        """Take what no module around a head has returned."""
        for tap in self.taps:
            tap.flush()

    def take(self) -> OutputSums | None:
        """Sums so far, None if nothing was seen; they start again."""
        taken, self.sums = self.sums, None
        return taken

    def _add(self, sums: OutputSums) -> None:
        self.sums = sums if self.sums is None else self.sums.plus(sums)

    def _see_pass(self, seen: HeadPass) -> None:
        entropy = seen.stats.entropy
        if not self.is_training() or entropy is None or not entropy.numel():
            return
        with self.clock.running():
            self.has_targets |= seen.target is not None
            valid = None if seen.target is None else seen.target >= 0
            self._add(exact_sums(seen.stats, valid))
            flat = None if valid is None else valid.flatten()
            rows = min(self._rows, max(_FEW, entropy.numel() // 4))
            sample = choose_tokens(entropy.numel(), flat, rows, self._generator)
            top = linear_head_stats(**seen.rows(sample.places), stats=_OF_A_SAMPLE, top_k=self.top_k)
            self._add(top_sums(top, sample))

    @torch.no_grad()
    def _see_logits(self, logits: Tensor, targets: Tensor | None) -> None:
        if not logits.numel():
            return
        with self.clock.running():
            self.has_targets |= targets is not None
            targets = None if targets is None else targets.flatten().to(logits.device)
            valid = None if targets is None else targets >= 0
            sample = choose_tokens(logits.shape[:-1].numel(), valid, self._rows, self._generator)
            rows = rows_of(logits, sample.places)
            rows = rows if self.temperature == 1 else rows.float() / self.temperature
            target = None if targets is None else targets[sample.places]
            self._add(sampled_sums(logit_statistics(rows, target, self.top_k), sample))


def rows_of(logits: Tensor, places: Tensor) -> Tensor:
    """Rows of logits [..., V] at some places [n] of the flat batch, [n, V]; all of them, if ranks hold parts.

    Example::

        >>> rows_of(torch.arange(12.0).view(2, 2, 3), torch.tensor([3, 0]))
        tensor([[ 9., 10., 11.],
                [ 0.,  1.,  2.]])
    """
    if not isinstance(logits, DTensor):
        return logits.flatten(0, -2)[places]
    last, V = logits.ndim - 1, logits.shape[-1]
    if any(not (placement.is_replicate() or placement.is_shard(last)) for placement in logits.placements):
        logits = logits.redistribute(placements=[Replicate()] * logits.device_mesh.ndim)
    parts = [Shard(1) if placement.is_shard(last) else Replicate() for placement in logits.placements]
    local = logits.to_local().flatten(0, -2)[places]
    shape = torch.Size([len(places), V])
    return DTensor.from_local(local, logits.device_mesh, parts, shape=shape, stride=(V, 1)).full_tensor()
