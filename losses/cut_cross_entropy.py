"""Cross-entropy of a linear head whose logits are never stored."""

from collections.abc import Sequence
from typing import Any, TypedDict, Unpack, overload

import torch.distributed as dist
from torch import Tensor, nn

from litropy.kernels.linear_head import Plan, linear_head_rows
from litropy.kernels.linear_head_fused import RowLoss
from litropy.kernels.linear_head_loss import linear_head_loss
from litropy.kernels.linear_head_types import row_losses
from litropy.losses.head_inputs import Impl, LowRank, prepare, resolve_impl
from litropy.losses.head_passes import HeadPass, is_watched, show_pass, with_watched
from litropy.losses.linear_head import HeadStats, check_stats, wanted
from litropy.losses.modes import Mode, choose_mode
from litropy.losses.row_weights import Reduction, check_reduction, row_weights

__all__ = ["CutCrossEntropyLoss", "linear_cross_entropy"]


class Options(TypedDict, total=False):
    """Keyword arguments of ``linear_cross_entropy`` that do not change the type of its result."""

    linear_bias: Tensor | None
    weight: Tensor | None
    reduction: Reduction
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    temperature: float | Tensor
    token_weight: Tensor | None
    num_items: float | Tensor | None
    skip_tol: float
    low_rank: LowRank | None
    vocab_parallel_group: dist.ProcessGroup | None
    mode: Mode
    memory_budget_mib: float
    impl: Impl


@overload
def linear_cross_entropy(  # type: ignore[overload-overlap]
    input: Tensor, linear_weight: Tensor, target: Tensor, *, return_stats: tuple[()] = ..., **options: Unpack[Options]
) -> Tensor: ...


@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, return_stats: Sequence[str], **options: Unpack[Options]
) -> tuple[Tensor, HeadStats]: ...


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    skip_tol: float = 0.0,
    return_stats: Sequence[str] = (),
    low_rank: LowRank | None = None,
    vocab_parallel_group: dist.ProcessGroup | None = None,
    mode: Mode = "auto",
    memory_budget_mib: float = 64,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, HeadStats]:
    """Cross-entropy of ``softmax(input @ linear_weight.T + linear_bias)`` without its logits in memory.

    For one token with hidden state h and target y, with class weights c (1 unless given)::

        z = softcap tanh((W h + b) / softcap) / temperature
        lse = log sum_v exp z_v
        loss = token_weight ((1 - label_smoothing) c_y (lse - z_y) + label_smoothing mean_v c_v (lse - z_v)
               + z_loss lse^2)

    Args:
        input: hidden states, shape [..., D]; cast to the dtype of the head, or of autocast.
        linear_weight: head weight, shape [V, D]. Its gradient is summed up in float32 and comes in its own dtype; where
            it has an attribute ``main_grad`` [V, D], the gradient is added there and ``.grad`` stays as it is. A
            DTensor that is cut by rows is a shard of the vocabulary.
        target: token ids, int64, shape [...].
        linear_bias: head bias, shape [V].
        weight: weight of each class, shape [V]; no gradient flows to it.
        reduction: ``"mean"``, the sum divided by the sum of the class weights of all targets that are not ignored;
            ``"sum"``; or ``"none"`` (0 at ignored tokens).
        ignore_index: target value that marks a token without a loss.
        label_smoothing: share of the loss that goes to the whole vocabulary, in [0, 1].
        z_loss: factor of the squared log-sum-exp, which keeps logits from drifting; 1e-4 is usual.
        softcap: bound of the logits (Gemma 2), a positive number.
        temperature: a positive number, or one a token, shape [...]; no gradient flows to it.
        token_weight: weight of each token's loss, shape [...]; it stays out of the mean's denominator, and no gradient
            flows to it.
        num_items: replaces the denominator of the mean: the number of tokens of a whole optimiser step, say.
        skip_tol: the largest share of a row's softmax mass that the backward pass may leave out, in [0, 1); 0 is
            exact, 1e-3 is about the rounding of bfloat16. It pays where the model is sure of its tokens.
        return_stats: names of ``HeadStats`` fields to return beside the loss, from the same pass and detached.
        low_rank: a pair u [..., R] and B [V, R] that adds ``u B^T`` to the raw logits: a LoRA adapter of the head.
        vocab_parallel_group: ranks that hold one shard of ``linear_weight``, ``linear_bias`` and ``weight`` each, in
            the order of their ranks; all have the same input and target, whose ids are global.
        mode: ``"fast"`` forms the gradient in the forward pass from blocks of whole rows of logits within the memory
            budget; ``"lean"`` recomputes logits in the backward pass; ``"auto"`` takes the fast one where it can.
        memory_budget_mib: workspace in MiB.
        impl: ``"triton"``, ``"torch"``, or ``"auto"``: Triton on a GPU, PyTorch on a CPU.

    Returns:
        The loss in float32 (float64 for float64 inputs): a scalar, or shaped like ``target`` for ``"none"``; with
        ``return_stats`` a pair of the loss and the ``HeadStats``. An empty batch, or one ignored altogether, has
        the loss 0 and zero gradients.

    Raises:
        ValueError: if shapes, dtypes or options do not fit, or, on a CPU, a target is outside the vocabulary. On a
            GPU that makes the loss NaN.

    Example::

        >>> import torch
        >>> h, w = torch.zeros(2, 8), torch.randn(4, 8)
        >>> linear_cross_entropy(h, w, torch.tensor([0, 3]))
        tensor(1.3863)

    Reference: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, ICLR 2025, for the idea.
    """
    _check(reduction, label_smoothing, num_items, skip_tol, mode, memory_budget_mib)
    _check_stats(return_stats, skip_tol)
    rows = prepare(
        input,
        linear_weight,
        target,
        bias=linear_bias,
        softcap=softcap,
        temperature=temperature,
        low_rank=low_rank,
        class_weight=weight,
        ignore_index=ignore_index,
        group=vocab_parallel_group,
    )
    assert rows.target is not None
    row_weight = row_weights(rows.target, rows.class_weight, reduction, num_items, token_weight, rows.head.stats_dtype)
    loss = RowLoss(row_weight, rows.class_weight, label_smoothing, z_loss)
    names = with_watched(return_stats)
    want = wanted(names, mean_logprob=label_smoothing > 0)
    budget = int(memory_budget_mib * 2**20)
    plan = Plan(resolve_impl(impl, rows.input.device, rows.dtype), rows.dtype, budget, skip_tol)
    if choose_mode(mode, rows, want, plan, reduction) == "fast":
        total, stats = linear_head_loss(rows.input, rows.head, rows.target, loss, want, plan)
    else:
        stats, _ = linear_head_rows(rows.input, rows.head, rows.target, want, plan, rows.shard, rows.main_grad)
        losses = row_weight * row_losses(stats, rows.class_weight, label_smoothing, z_loss)
        total = losses.view(target.shape) if reduction == "none" else losses.sum()
    if is_watched(total):
        found = HeadStats.of(stats, names, input.shape[:-1], detach=True)
        labels = target.masked_fill(target == ignore_index, -1)
        head = (linear_weight, linear_bias, softcap, temperature, low_rank, vocab_parallel_group)
        show_pass(HeadPass(found, labels, input, *head, impl))
    if not return_stats:
        return total
    return total, HeadStats.of(stats, return_stats, input.shape[:-1], detach=True)


def _check(
    reduction: str,
    label_smoothing: float,
    num_items: float | Tensor | None,
    skip_tol: float,
    mode: str,
    memory_budget_mib: float,
) -> None:
    check_reduction(reduction, num_items)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"`label_smoothing` is {label_smoothing}; it must be in [0, 1].")
    if not 0 <= skip_tol < 1:
        raise ValueError(f"`skip_tol` is {skip_tol}; it must be in [0, 1).")
    if mode not in ("auto", "fast", "lean"):
        raise ValueError(f"`mode` is {mode!r}; choose 'auto', 'fast' or 'lean'.")
    if memory_budget_mib <= 0:
        raise ValueError(f"`memory_budget_mib` is {memory_budget_mib}; it must be positive.")


def _check_stats(names: Sequence[str], skip_tol: float) -> None:
    check_stats(names)
    for name in names:
        if name in ("nucleus_entropy", "topk_entropy", "topk_mass"):
            raise ValueError(f"`return_stats` asks for {name}, which has options of its own: use `linear_head_stats`.")
        if name in ("skipped_mass", "surviving_share") and not skip_tol:
            raise ValueError(
                f"`return_stats` asks for {name}, but `skip_tol` is {skip_tol}: nothing is skipped. Leave it out, or"
                " say how much may be."
            )
        if name == "rank" and skip_tol:
            raise ValueError(
                "`return_stats` asks for rank and `skip_tol` is positive: the pass that ranks logits records no tiles"
                " to skip. Leave one out, or take the rank from `linear_head_stats`."
            )


class CutCrossEntropyLoss(nn.Module):
    """``linear_cross_entropy`` as a module that holds its options and owns no weight.

    Args:
        weight: weight of each class, shape [V]; a buffer.
        reduction: ``"mean"`` over tokens that are not ignored, ``"sum"``, or ``"none"``.
        ignore_index: target value that marks a token without a loss.
        label_smoothing: share of the loss that goes to the whole vocabulary, in [0, 1].
        z_loss: factor of the squared log-sum-exp.
        softcap: bound of the logits, a positive number.
        temperature: divides the logits, a positive number.
        skip_tol: the largest share of a row's softmax mass that the backward pass may leave out, in [0, 1).
        return_stats: names of ``HeadStats`` fields to return beside the loss.
        vocab_parallel_group: ranks that hold one shard of the head each.
        mode: ``"fast"``, ``"lean"`` or ``"auto"``.
        memory_budget_mib: workspace, in MiB.
        impl: ``"triton"``, ``"torch"`` or ``"auto"``.

    Example::

        >>> import torch
        >>> head = torch.nn.Linear(8, 4, bias=False)
        >>> CutCrossEntropyLoss()(torch.zeros(2, 8), head.weight, torch.tensor([0, 3]))
        tensor(1.3863, grad_fn=<...>)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        skip_tol: float = 0.0,
        return_stats: Sequence[str] = (),
        vocab_parallel_group: dist.ProcessGroup | None = None,
        mode: Mode = "auto",
        memory_budget_mib: float = 64,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        _check(reduction, label_smoothing, None, skip_tol, mode, memory_budget_mib)
        _check_stats(return_stats, skip_tol)
        self.weight: Tensor | None
        self.register_buffer("weight", weight)
        self.options: dict[str, Any] = {
            "reduction": reduction,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
            "temperature": temperature,
            "skip_tol": skip_tol,
            "return_stats": tuple(return_stats),
            "vocab_parallel_group": vocab_parallel_group,
            "mode": mode,
            "memory_budget_mib": memory_budget_mib,
            "impl": impl,
        }

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        linear_bias: Tensor | None = None,
        *,
        token_weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
        low_rank: LowRank | None = None,
    ) -> Tensor | tuple[Tensor, HeadStats]:
        """Compute the loss of hidden states [..., D] and targets [...] for a head [V, D] with an optional bias [V]."""
        return linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=self.weight,
            token_weight=token_weight,
            num_items=num_items,
            low_rank=low_rank,
            **self.options,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
