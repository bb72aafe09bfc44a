"""One optimiser step's gradient, in two phases, so that it depends neither on micro-batches nor on ranks.

First the statistics of the whole mini-batch, on all ranks: every method sees all tokens at once. The loss is a function
of these few numbers a token, so its gradient is one cotangent for each: ``dL / d logprob_t``, ``dL / d entropy_t``.
Then the micro-batches: each computes its tokens' statistics once more, with a graph, and passes their cotangents back.
Responses and tokens without any are left out there.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from litropy.losses import HeadStats
from litropy.recipes.causal_lm import CausalLM
from litropy.recipes.rlvr_policy import Wanted, response_stats
from litropy.recipes.rlvr_ranks import gather_stats, rank_and_ranks
from litropy.recipes.steering.batch import RolloutBatch, UpdateBatch, stat
from litropy.recipes.steering.objective import Methods, Objective, objective

__all__ = ["accumulate_gradients", "batch_stats", "cotangents"]

_DIFFERENTIABLE = ("logprob", "entropy", "nucleus_entropy")


def _stacked(parts: list[HeadStats]) -> HeadStats:
    """Micro-batches' statistics one below the other, without their graphs."""
    names = [name for name, value in vars(parts[0]).items() if value is not None]
    return HeadStats(**{name: torch.cat([stat(part, name).detach() for part in parts]) for name in names})


def _micro_batches(num_rows: int, size: int, device: torch.device) -> list[Tensor]:
    """This rank's rows in pieces; a rank without any has one empty piece."""
    rank, ranks = rank_and_ranks()
    return list(torch.arange(rank, num_rows, ranks, device=device).split(size))


@torch.no_grad()
def batch_stats(policy: CausalLM, batch: RolloutBatch, wanted: Wanted, size: int) -> HeadStats:
    """Statistics of a rank's own responses, some at a time."""
    rows = torch.arange(len(batch), device=batch.row.device)
    return _stacked([response_stats(policy, batch[piece], wanted) for piece in rows.split(size)])


def cotangents(methods: Methods, batch: UpdateBatch) -> tuple[Objective, dict[str, Tensor]]:
    """The loss of a mini-batch, and its derivatives with respect to the statistics of each token, [R, T] each."""
    leaves = {
        name: stat(batch.current, name).detach().requires_grad_()
        for name in _DIFFERENTIABLE
        if getattr(batch.current, name) is not None
    }
    with torch.enable_grad():
        found = objective(methods, replace(batch, current=replace(batch.current, **leaves)))
        gradients = torch.autograd.grad(found.loss, list(leaves.values()), allow_unused=True)
    known = {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return replace(found, loss=found.loss.detach()), known


def accumulate_gradients(
    policy: CausalLM,
    methods: Methods,
    rollouts: RolloutBatch,
    advantage: Tensor,
    *,
    wanted: Wanted,
    micro_batch_size: int,
    unchanged: bool = False,
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
) -> tuple[Objective, UpdateBatch]:
    """Add this rank's share of a mini-batch's gradient to the parameters; the sum over ranks is the whole.

    Args:
        policy: the model.
        methods: what is in the slots.
        rollouts: the mini-batch of all ranks, the same on each.
        advantage: of each token [R, T].
        wanted: statistics that the methods read.
        micro_batch_size: responses that go through the model at a time.
        unchanged: whether the policy is still the one of ``rollouts.stats``, which then serve for the first phase.
        backward: what to call in place of ``Tensor.backward``.

    Returns:
        The objective, and the mini-batch as the methods saw it.
    """
    pieces = _micro_batches(len(rollouts), micro_batch_size, rollouts.row.device)
    live: HeadStats | None = None
    current = rollouts.stats
    if not unchanged:
        parts = []
        for place, rows in enumerate(pieces):
            # the last piece's graph is kept for the second phase
            with torch.set_grad_enabled(place == len(pieces) - 1):
                live = response_stats(policy, rollouts[rows], wanted)
                parts.append(live)
        current = gather_stats(_stacked(parts), len(rollouts))
    batch = UpdateBatch(rollouts, advantage, current)
    found, gradients = cotangents(methods, batch)
    second = replace(wanted, names=tuple(gradients)) if gradients else wanted
    # groups of equal rewards have no gradient, nor have tokens that a method leaves out
    moving = torch.zeros_like(rollouts.mask)
    for gradient in gradients.values():
        moving = moving | (gradient != 0)
    for place, rows in enumerate(pieces):
        stats = live if place == len(pieces) - 1 else None
        if stats is None:
            rows = rows[moving[rows].any(1)]
        if not bool(moving[rows].any()):
            continue
        if stats is None:
            stats = response_stats(policy, rollouts[rows], second, moving[rows])
        terms = [(gradient[rows] * stat(stats, name)).sum() for name, gradient in gradients.items()]
        backward(torch.stack(terms).sum())
    return found, batch
