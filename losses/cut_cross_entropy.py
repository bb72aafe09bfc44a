"""Cross-entropy of a linear head whose logits are never stored."""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor, nn

from litropy.kernels.linear_head import linear_head_rows
from litropy.kernels.linear_head_fused import fused_rows
from litropy.kernels.linear_head_loss import linear_head_loss
from litropy.kernels.linear_head_types import RowStats, Want, row_losses
from litropy.losses.head_inputs import HeadInputs, Impl, prepare, resolve_impl
from litropy.losses.linear_head import HeadStats, check_stats

__all__ = ["CutCrossEntropyLoss", "linear_cross_entropy"]

Reduction = Literal["mean", "sum", "none"]


class Options(TypedDict, total=False):
    """Keyword arguments of ``linear_cross_entropy`` that do not change the type of its result."""

    linear_bias: Tensor | None
    reduction: Reduction
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    temperature: float | Tensor
    num_items: float | Tensor | None
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
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    num_items: float | Tensor | None = None,
    return_stats: Sequence[str] = (),
    memory_budget_mib: float = 64,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, HeadStats]:
    """Cross-entropy of ``softmax(input @ linear_weight.T + linear_bias)`` without its logits in memory.

    For one token with hidden state h and target y::

        z = softcap tanh((W h + b) / softcap) / temperature
        lse = log sum_v exp z_v
        loss = (1 - label_smoothing) (lse - z_y) + label_smoothing mean_v(lse - z_v) + z_loss lse^2

    Args:
        input: hidden states, shape [..., D].
        linear_weight: head weight, shape [V, D], in the dtype of ``input`` (or under autocast).
        target: token ids, int64, shape [...].
        linear_bias: head bias, shape [V].
        reduction: ``"mean"`` over tokens that are not ignored, ``"sum"``, or ``"none"`` (0 at ignored tokens).
        ignore_index: target value that marks a token without a loss.
        label_smoothing: share of the loss that goes to the whole vocabulary, in [0, 1].
        z_loss: factor of the squared log-sum-exp, which keeps logits from drifting; 1e-4 is usual.
        softcap: bound of the logits (Gemma 2), a positive number.
        temperature: a positive number, or one a token, shape [...]; no gradient flows to it.
        num_items: replaces the denominator of the mean: the number of tokens of a whole optimiser step, say.
        return_stats: names of ``HeadStats`` fields to return beside the loss, from the same pass and detached.
        memory_budget_mib: workspace of the PyTorch implementation, and of the backward pass on a GPU, in MiB.
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
    _check(reduction, label_smoothing, num_items, memory_budget_mib)
    check_stats(return_stats)
    rows = prepare(input, linear_weight, target, linear_bias, softcap, temperature)
    assert rows.target is not None
    labels = _mark_ignored(rows.target, ignore_index, linear_weight.shape[0])
    want = Want("entropy" in return_stats, label_smoothing > 0, "argmax" in return_stats)
    budget = int(memory_budget_mib * 2**20)
    chosen = resolve_impl(impl, input)
    if reduction == "none":
        stats = linear_head_rows(rows.input, rows.head, labels, want, chosen, budget)
        loss = row_losses(stats, label_smoothing, z_loss).view(target.shape)
    else:
        weights = _row_weights(labels, reduction, num_items, rows.head.stats_dtype)
        loss, stats = _weighted_loss(rows, labels, weights, label_smoothing, z_loss, want, chosen, budget)
    if not return_stats:
        return loss
    return loss, HeadStats.of(stats, return_stats, target.shape, detach=True)


def _weighted_loss(
    rows: HeadInputs,
    labels: Tensor,
    weights: Tensor,
    label_smoothing: float,
    z_loss: float,
    want: Want,
    impl: Literal["triton", "torch"],
    budget: int,
) -> tuple[Tensor, RowStats]:
    """``sum_n weights_n loss_n``, the gradient in the forward pass where whole rows fit the budget, else recomputed."""
    needs_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (rows.input, rows.head.weight, rows.head.bias)
    )
    if impl == "torch" and needs_grad and fused_rows(labels.shape[0], rows.head, budget):
        return linear_head_loss(rows.input, rows.head, labels, weights, label_smoothing, z_loss, want, budget)
    stats = linear_head_rows(rows.input, rows.head, labels, want, impl, budget)
    return (weights * row_losses(stats, label_smoothing, z_loss)).sum(), stats


def _check(reduction: str, label_smoothing: float, num_items: float | Tensor | None, memory_budget_mib: float) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"`reduction` is {reduction!r}; choose 'mean', 'sum' or 'none'.")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"`label_smoothing` is {label_smoothing}; it must be in [0, 1].")
    if num_items is not None and reduction != "mean":
        raise ValueError(
            f"`num_items` replaces the denominator of the mean; it does nothing with reduction={reduction!r}."
        )
    if isinstance(num_items, Tensor) and (num_items.requires_grad or num_items.numel() != 1):
        raise ValueError("`num_items` must be a number or a tensor of one element that requires no gradient.")
    if memory_budget_mib <= 0:
        raise ValueError(f"`memory_budget_mib` is {memory_budget_mib}; it must be positive.")


def _mark_ignored(target: Tensor, ignore_index: int, vocabulary: int) -> Tensor:
    """Map ``ignore_index`` to -1, which the kernels ignore, and other negative targets to V, which is out of range."""
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (target < 0) & (target != ignore_index)
        if bool(wrong.any()):
            raise ValueError(
                f"`target` holds {int(target[wrong][0])}, which is neither in the vocabulary (0 to {vocabulary - 1})"
                f" nor `ignore_index` ({ignore_index})."
            )
    outside = target.masked_fill(target < 0, vocabulary)
    return outside.masked_fill(target == ignore_index, -1)


def _row_weights(labels: Tensor, reduction: Reduction, num_items: float | Tensor | None, dtype: torch.dtype) -> Tensor:
    """Weight of each row in the reduced loss, [N]; the mean over no tokens is 0, not NaN."""
    valid = (labels >= 0).to(dtype)
    if reduction == "sum":
        return valid
    if num_items is None:
        return valid / valid.sum().clamp_min(1)
    if isinstance(num_items, Tensor):
        num_items = num_items.to(device=valid.device, dtype=dtype).reshape(())
    # not 0 / 0 at ignored tokens: a step without any token to learn from has num_items = 0
    return (valid / num_items).masked_fill(labels < 0, 0.0)


class CutCrossEntropyLoss(nn.Module):
    """``linear_cross_entropy`` as a module that holds its options and owns no weight.

    Args:
        reduction: ``"mean"`` over tokens that are not ignored, ``"sum"``, or ``"none"``.
        ignore_index: target value that marks a token without a loss.
        label_smoothing: share of the loss that goes to the whole vocabulary, in [0, 1].
        z_loss: factor of the squared log-sum-exp.
        softcap: bound of the logits, a positive number.
        temperature: divides the logits, a positive number.
        return_stats: names of ``HeadStats`` fields to return beside the loss.
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
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        return_stats: Sequence[str] = (),
        memory_budget_mib: float = 64,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        _check(reduction, label_smoothing, None, memory_budget_mib)
        check_stats(return_stats)
        self.options: dict[str, Any] = {
            "reduction": reduction,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
            "temperature": temperature,
            "return_stats": tuple(return_stats),
            "memory_budget_mib": memory_budget_mib,
            "impl": impl,
        }

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        linear_bias: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, HeadStats]:
        """Compute the loss of hidden states [..., D] and targets [...] for a head [V, D] with an optional bias [V]."""
        return linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, num_items=num_items, **self.options
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
