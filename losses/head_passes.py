"""Lets a monitor look on when training passes a linear head, and add statistics to that same pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from litropy.losses.head_inputs import Impl, LowRank

if TYPE_CHECKING:
    from litropy.losses.linear_head import HeadStats

__all__ = ["HeadPass", "is_watched", "show_pass", "watch_head_passes", "with_watched"]


class HeadPass(NamedTuple):
    """One call of ``linear_cross_entropy`` or ``linear_head_stats`` that gradients will flow back through.

    Attributes:
        stats: the statistics that watchers asked for, detached; ``logprob`` only if there is a target.
        target: token ids [...], negative where ignored, or None.
        input: hidden states, [..., D].
        linear_weight: head weight, [V, D]; under FSDP2 a plain tensor, because the call is inside ``forward``.
        linear_bias: head bias, [V], or None.
        softcap: bound of the logits, or None.
        temperature: what divides them, a number or one a row, [...].
        low_rank: what adapters add to them, as in ``linear_head_stats``.
        vocab_parallel_group: ranks that hold shards of the head.
        impl: the implementation that was asked for.
    """

    stats: "HeadStats"
    target: Tensor | None
    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    softcap: float | None
    temperature: float | Tensor
    low_rank: LowRank | None
    vocab_parallel_group: dist.ProcessGroup | None
    impl: Impl

    def rows(self, index: Tensor) -> dict[str, Any]:
        """Arguments of ``linear_head_stats`` for some of the flat rows, without target; ``index`` is int64, [n]."""
        temperature, low_rank = self.temperature, self.low_rank
        if isinstance(temperature, Tensor) and temperature.ndim:
            temperature = temperature.reshape(-1)[index]
        if low_rank is not None:
            low_rank = low_rank[0].flatten(0, -2)[index], low_rank[1]
        options = self._asdict() | {
            "input": self.input.flatten(0, -2)[index],
            "temperature": temperature,
            "low_rank": low_rank,
        }
        del options["stats"], options["target"]
        return options


_watchers: list[tuple[Callable[[HeadPass], None], tuple[str, ...]]] = []


@contextmanager
def watch_head_passes(watcher: Callable[[HeadPass], None], stats: Sequence[str]) -> Iterator[None]:
    """Call ``watcher`` after every pass inside the context, without gradients.

    Compiled code has not seen the watcher and does not call it.

    Args:
        watcher: may pass the head itself; that is not watched.
        stats: names of the ``HeadStats`` fields that it needs, of those without options of their own.

    Example::

        >>> from litropy.losses import linear_cross_entropy
        >>> h, w = torch.zeros(2, 8, requires_grad=True), torch.randn(4, 8)
        >>> with watch_head_passes(lambda seen: print(seen.stats.entropy), ["entropy"]):
        ...     loss = linear_cross_entropy(h, w, torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])
    """
    entry = (watcher, tuple(stats))
    _watchers.append(entry)
    try:
        yield
    finally:
        _watchers.remove(entry)


def with_watched(names: Sequence[str], has_target: bool = True) -> tuple[str, ...]:
    """The statistics that a caller asks for, and those that watchers do."""
    if not _watchers or not torch.is_grad_enabled():
        return tuple(names)
    watched = [name for _, stats in _watchers for name in stats if has_target or name != "logprob"]
    return tuple(dict.fromkeys([*names, *watched]))


def is_watched(result: Tensor) -> bool:
    """Whether to show the pass that has led to this result."""
    return bool(_watchers) and result.requires_grad


def show_pass(seen: HeadPass) -> None:
    """Show a pass to all watchers."""
    with torch.no_grad():
        for watcher, _ in tuple(_watchers):
            watcher(seen)
