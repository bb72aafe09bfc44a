"""Entropy of attention rows without the matrix of attention, as a PyTorch operator with a backward pass.

For query i of a head, at position ``P_i = i + Tk - Tq`` (the last query stands at the last key), and key j::

    a_ij = scale q_i . k_j                                    raw logit
    z_ij = softcap tanh(a_ij / softcap) + bias_ij - slope |P_i - j|
    p_ij = exp(z_ij - lse_i)        lse_i = log sum_j exp z_ij, over visible keys and the sink logit
    H_i  = - sum_j p_ij log p_ij - p_sink log p_sink          entropy [nats]

Shape key: B batch, H query heads, R selected rows, Tq and Tk positions of queries and keys, D width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from litropy.kernels.attention_entropy_inputs import check_rows, prepare
from litropy.kernels.attention_entropy_torch import row_gradients, row_stats
from litropy.kernels.attention_entropy_types import Attention, AttentionStats, RowStats, RowTerms
from litropy.kernels.implementation import Impl, resolve_impl

__all__ = ["AttentionStats", "attention_entropy"]

_ATTENTION_SCHEMA = (
    "Tensor k, Tensor? sinks, Tensor? segments, Tensor? key_segments, Tensor? key_mask, Tensor? mask, Tensor? bias,"
    " Tensor? alibi_slopes, Tensor? prefix, float scale, float softcap, int window, bool causal"
)
_ATTENTION = len(Attention._fields)
_TENSORS = 2 + _ATTENTION - 4  # q, rows, and what is not a number of ``Attention``
# what the backward pass reads of the statistics
_SAVED = ("entropy", "max_logit", "p_max", "p_sink")


def _full_precision(q: Tensor) -> torch.autocast:
    """Autocast reaches into operators, and would round logits to its dtype."""
    return torch.autocast(q.device.type, enabled=False)


@custom_op(
    "litropy::attention_entropy",
    mutates_args=(),
    schema=f"(Tensor q, Tensor? rows, {_ATTENTION_SCHEMA}, str impl)"
    f" -> ({', '.join(f'Tensor {name}' for name in RowStats._fields)})",
)
def _stats(q: Tensor, rows: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    attention, impl, wrong = Attention(*rest[:_ATTENTION]), rest[-1], None
    if rows is not None:
        rows, wrong = check_rows(rows, q.shape[2])
    compute = row_stats
    if impl == "triton":
        from litropy.kernels.attention_entropy_triton import row_stats as compute
    with _full_precision(q):
        stats = compute(q, attention, rows)
    if wrong is not None:
        stats = RowStats(*(x.masked_fill(wrong[:, None], torch.nan) for x in stats))
    return tuple(stats)


@_stats.register_fake
def _(q: Tensor, rows: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(RowStats.zeros(q, q.shape[2] if rows is None else rows.shape[1]))


@custom_op(
    "litropy::attention_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor? g_entropy, Tensor? g_lse, {', '.join(f'Tensor {name}' for name in _SAVED)}, bool[] need,"
    f" Tensor q, Tensor? rows, {_ATTENTION_SCHEMA}, str impl) -> (Tensor, Tensor, Tensor)",
)
def _gradients(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    g_entropy, g_lse, entropy, max_logit, p_max, p_sink, need, q, rows, *rest = arguments
    attention, impl = Attention(*rest[:_ATTENTION]), rest[-1]
    if rows is not None:
        rows, _ = check_rows(rows, q.shape[2])
    g_entropy, g_lse = (torch.zeros_like(entropy) if g is None else g for g in (g_entropy, g_lse))
    d_q, d_k, d_sinks = _gradient_buffers(q, attention, need)
    d_rows = torch.zeros((*entropy.shape, q.shape[3]), dtype=entropy.dtype, device=q.device) if need[0] else None
    terms = RowTerms(entropy, max_logit, p_max.log(), g_entropy, g_lse)
    compute = row_gradients
    if impl == "triton":
        from litropy.kernels.attention_entropy_triton import row_gradients as compute
    if need[0] or need[1]:
        with _full_precision(q):
            compute(q, attention, rows, terms, d_rows, d_k if need[1] else None)
    if d_rows is not None:
        _add_rows(d_q, rows, d_rows.to(q.dtype))
    if need[2]:
        surprise = torch.xlogy(p_sink, p_sink) + p_sink * entropy
        d_sinks.copy_((p_sink * g_lse - surprise * g_entropy).sum((0, 2)))
    return d_q, d_k, d_sinks


def _gradient_buffers(q: Tensor, attention: Attention, need: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros of the gradients that are needed, and empty tensors for the others: an operator returns all."""

    def zeros(x: Tensor | None, wanted: bool) -> Tensor:
        return q.new_zeros(0) if x is None or not wanted else x.new_zeros(x.shape)

    return zeros(q, need[0]), zeros(attention.k, need[1]), zeros(attention.sinks, need[2])


def _add_rows(d_q: Tensor, rows: Tensor | None, d_rows: Tensor) -> None:
    """Add the gradients of rows [B, H, R, D] to those of queries, repeated rows one after the other."""
    if rows is None:
        d_q.add_(d_rows)
    elif d_q.device.type == "cpu":
        for b, d_batch in enumerate(d_q):
            d_batch.index_add_(1, rows[b if rows.shape[0] > 1 else 0], d_rows[b])
    else:  # index_add_ there takes atomics, in any order; this sorts
        batch = torch.arange(d_q.shape[0], device=d_q.device)[:, None]
        index = (batch, rows.expand(d_q.shape[0], -1))
        d_q.transpose(1, 2).index_put_(index, d_rows.transpose(1, 2), accumulate=True)


@_gradients.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    need, q, _, *rest = arguments[2 + len(_SAVED) :]
    return _gradient_buffers(q, Attention(*rest[:_ATTENTION]), need)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    stats = RowStats(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*stats[2:])
    ctx.options = inputs[_TENSORS:]
    ctx.save_for_backward(*(getattr(stats, name) for name in _SAVED), *inputs[:_TENSORS])


def _autograd(ctx: Any, g_entropy: Tensor | None, g_lse: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: under checkpointing they can be unpacked no more often
    stats, inputs = saved[: len(_SAVED)], saved[len(_SAVED) :]
    need = [ctx.needs_input_grad[i] for i in (0, 2, 3)]  # q, k, sinks
    d_q, d_k, d_sinks = _gradients(g_entropy, g_lse, *stats, need, *inputs, *ctx.options)
    found = [x if wanted else None for x, wanted in zip((d_q, d_k, d_sinks), need, strict=True)]
    return (found[0], None, *found[1:], *[None] * (len(inputs) - 4 + len(ctx.options)))


_stats.register_autograd(_autograd, setup_context=_setup)


def attention_entropy(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    prefix_length: int | Tensor | None = None,
    segment_ids: Tensor | None = None,
    key_segment_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    rows: Tensor | None = None,
    impl: Impl = "auto",
) -> AttentionStats:
    """Entropy and other statistics of selected attention rows, from queries and keys as attention itself gets them.

    ``H_i = - sum_j p_ij log p_ij`` over what query i may attend to, ``p_i = softmax(z_i)``,
    ``z_ij = softcap tanh(scale q_i.k_j / softcap) + bias_ij - slope |P_i - j|``. Nothing of the size Tq x Tk is
    allocated. A key has to be visible by every rule that is given. Differentiable with respect to q, k and sinks.

    Args:
        q: queries, [B, H, Tq, D], as they enter the product: after rotary embeddings and normalisation. Any strides.
        k: keys, [B, Hkv, Tk, D], H a multiple of Hkv: a group of H / Hkv query heads shares a key head.
        scale: factor of q.k; None for 1 / sqrt(D).
        causal: whether query i sees keys j <= P_i only, where P_i = i + Tk - Tq: the last query stands at the last key.
        window: how many keys back a query sees, its own included: |P_i - j| < window. (A sliding window of w in Hugging
            Face's bidirectional attention reaches one further: window = w + 1.)
        prefix_length: so many first keys, a number or one for each batch entry [B], are exempt from causal and window.
        segment_ids: document of each query, [B, Tq] integers; queries see keys of their own document.
        key_segment_ids: document of each key, [B, Tk]; None for those of the queries.
        position_ids: positions that tell packed documents apart instead, [B, Tq]: another document starts wherever a
            position is not the one before plus 1.
        key_mask: True where a key is visible, [B, Tk].
        mask: True where a key is visible, [B or 1, H or 1, Tq or 1, Tk]; read in place.
        bias: what is added to the logits, [B or 1, H or 1, Tq or 1, Tk]; read in place. It hides a
            key where it is -inf, or at most half of its dtype's most negative number, which is often written for that.
        alibi_slopes: what a key's logit loses for each position of distance, [H].
        softcap: bound of the raw logits, ``softcap * tanh(a / softcap)``; applied before biases.
        sinks: a logit for each head, [H], of one more outcome that takes probability but is no key: neither scaled nor
            capped. It counts in entropy and lse, and as an outcome in the normalised entropy.
        rows: which queries, [R] for the whole batch or [B, R], int64, repetitions allowed; None for all. Sorted rows
            are faster where attention is causal.
        impl: ``"auto"`` takes Triton on a GPU, PyTorch on a CPU. Both form logits in float32 (float64 for float64
            inputs), under autocast too.

    Returns:
        Float32 tensors [B, H, R] (float64 for float64 inputs): see ``AttentionStats``. Rows that see no key have 0 in
        every field, ``visible_keys`` included, and no gradient: leave them out of means by ``visible_keys > 0``.

    Raises:
        ValueError: if shapes, dtypes or options do not fit, or, on a CPU, a row does not exist; on a GPU, which would
            have to be waited for, such a row has NaN everywhere.

    Example::

        >>> q, k = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8)
        >>> attention_entropy(q, k, causal=True).entropy  # log 1, log 2, log 3, log 4
        tensor([[[0.0000, 0.6931, 1.0986, 1.3863]]])

    Reference: Zhai et al. 2023, "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", section 3.
    """
    attention, rows = prepare(
        q,
        k,
        rows,
        scale=scale,
        causal=causal,
        window=window,
        prefix_length=prefix_length,
        segment_ids=segment_ids,
        key_segment_ids=key_segment_ids,
        position_ids=position_ids,
        key_mask=key_mask,
        mask=mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        sinks=sinks,
    )
    stats = RowStats(*_stats(q, rows, *attention, resolve_impl(impl, q.device, q.dtype, "q")))
    outcomes = stats.visible_keys if sinks is None else stats.visible_keys + 1
    share = stats.entropy / outcomes.clamp_min(2).log()
    # a row with one outcome is uniform; one that sees no key is left out, sink logit or not
    share = share.masked_fill(outcomes == 1, 1.0).masked_fill(stats.visible_keys == 0, 0.0)
    return AttentionStats(normalized_entropy=share, **stats._asdict())
