"""Distillation of a linear head from a teacher's, whose logits are never stored either."""

from typing import Literal

import torch
from torch import Tensor

from litropy.kernels.linear_head import Plan
from litropy.kernels.linear_head_distillation import Divergence, Teacher, linear_head_divergence, rows_of_both
from litropy.losses.head_inputs import HeadInputs, Impl, LowRank, prepare, resolve_impl
from litropy.losses.row_weights import Reduction, check_reduction, row_weights
from litropy.losses.selected import linear_head_logprobs

__all__ = ["linear_head_distillation", "linear_head_topk_distillation"]

Kind = Literal["forward_kl", "reverse_kl", "jsd"]


def linear_head_distillation(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    *,
    kind: Kind = "forward_kl",
    beta: float = 0.5,
    mask: Tensor | None = None,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    low_rank: LowRank | None = None,
    memory_budget_mib: float = 64,
    impl: Impl = "auto",
) -> Tensor:
    """Divergence of a student's distribution q from a teacher's p, both linear heads without their logits in memory.

    For one token, with z as in ``linear_cross_entropy`` from each model's own hidden state and head::

        forward_kl    sum_v p_v (log p_v - log q_v)
        reverse_kl    sum_v q_v (log q_v - log p_v)
        jsd           beta sum_v p_v (log p_v - log m_v) + (1 - beta) sum_v q_v (log q_v - log m_v)
                      with m = beta p + (1 - beta) q

    The gradient goes to the student alone: to input, weight, bias and ``low_rank``. It is formed in the forward pass,
    from blocks of whole rows of both models' logits within the memory budget (for ``"none"`` and in float16 in the
    backward pass, which makes the logits anew).

    Args:
        input: the student's hidden states, shape [..., D].
        linear_weight: the student's head, shape [V, D].
        teacher_input: the teacher's hidden states, shape [..., D'].
        teacher_weight: the teacher's head, shape [V, D'].
        kind: which divergence; the reverse one makes the student seek modes.
        beta: the teacher's share of the mixture in ``"jsd"``, in (0, 1).
        mask: tokens that count, bool [...]; None for all.
        linear_bias: the student's bias, shape [V].
        teacher_bias: the teacher's bias, shape [V].
        softcap: bound of the student's logits, a positive number.
        teacher_softcap: bound of the teacher's logits.
        temperature: a positive number, or one a token, shape [...]. Gradients shrink with its square, by which many
            multiply the loss.
        teacher_temperature: the same of the teacher; None for the student's.
        token_weight: weight of each token, shape [...]; it stays out of the mean's denominator.
        reduction: ``"mean"`` over tokens that count, ``"sum"``, or ``"none"`` (0 at the others).
        num_items: replaces the denominator of the mean.
        low_rank: a pair u [..., R] and B [V, R] that adds ``u B^T`` to the student's raw logits.
        memory_budget_mib: workspace in MiB, with both models' logits; on a GPU some GiB make larger blocks. A head in
            half precision that takes more than six blocks sums up its weight's gradient in float32, 4 V D bytes more.
        impl: ``"triton"``, ``"torch"``, or ``"auto"``: Triton on a GPU, PyTorch on a CPU.

    Returns:
        The loss in float32 (float64 for a float64 student) [nats]: a scalar, or shaped [...] for ``"none"``.

    Raises:
        ValueError: if shapes, dtypes or options do not fit, a teacher or a head in shards is given that cannot be
            taken, or not a single row fits the memory budget.

    Example::

        >>> h, w = torch.zeros(2, 8), torch.randn(4, 8)
        >>> teacher_w = torch.tensor([[0.0], [0.0], [50.0], [50.0]])
        >>> linear_head_distillation(h, w, torch.ones(2, 1), teacher_w)
        tensor(0.6931)

    Reference: Hinton et al., arXiv 1503.02531; Agarwal et al., On-Policy Distillation, ICLR 2024, equation 1 (jsd).
    """
    _check(kind, beta, reduction, num_items, memory_budget_mib)
    student = prepare(
        input, linear_weight, None, bias=linear_bias, softcap=softcap, temperature=temperature, low_rank=low_rank
    )
    with torch.no_grad():
        teacher = prepare(
            teacher_input.detach(),
            teacher_weight.detach(),
            None,
            bias=None if teacher_bias is None else teacher_bias.detach(),
            softcap=teacher_softcap,
            temperature=temperature if teacher_temperature is None else teacher_temperature,
        )
    tokens, V = input.shape[:-1], student.head.weight.shape[0]
    _check_models(student, teacher, tokens, teacher_input.shape[:-1])
    mask = _flat_mask(mask, tokens, student.input.device)
    widest = torch.promote_types(student.dtype, teacher.dtype)
    budget = int(memory_budget_mib * 2**20)
    plan = Plan(resolve_impl(impl, student.input.device, widest), student.dtype, budget)
    if mask.numel() and not rows_of_both(len(mask), V, (student.dtype, teacher.dtype), budget):
        raise ValueError(f"Not a single row of {V} logits of both models fits `memory_budget_mib` = {budget / 2**20}.")
    # 1 and 0 make the mixture the teacher and the student
    divergence = Divergence(kind, {"forward_kl": 1.0, "reverse_kl": 0.0, "jsd": beta}[kind])
    weights = row_weights(mask.long() - 1, None, reduction, num_items, token_weight, student.head.stats_dtype)
    models = (student.input, student.head, Teacher(teacher.input, teacher.head, teacher.dtype), mask)
    # in float16 small gradients would be 0 before a loss scaler's factor arrives: they wait for it
    if reduction != "none" and torch.float16 not in (student.dtype, linear_weight.dtype):
        return linear_head_divergence(*models, weights, divergence, plan)
    losses = weights * linear_head_divergence(*models, None, divergence, plan)
    return losses.view(tokens) if reduction == "none" else losses.sum()


def _check(kind: str, beta: float, reduction: str, num_items: float | Tensor | None, memory_budget_mib: float) -> None:
    if kind not in ("forward_kl", "reverse_kl", "jsd"):
        raise ValueError(f"`kind` is {kind!r}; choose 'forward_kl', 'reverse_kl' or 'jsd'.")
    if not 0 < beta < 1:
        raise ValueError(f"`beta` is {beta}; it must be in (0, 1). Its limits are kind='reverse_kl' and 'forward_kl'.")
    if memory_budget_mib <= 0:
        raise ValueError(f"`memory_budget_mib` is {memory_budget_mib}; it must be positive.")
    check_reduction(reduction, num_items)


def _check_models(student: HeadInputs, teacher: HeadInputs, tokens: torch.Size, teacher_tokens: torch.Size) -> None:
    V, teacher_V = student.head.weight.shape[0], teacher.head.weight.shape[0]
    if teacher_V != V:
        raise ValueError(
            f"`linear_weight` has {V} entries and `teacher_weight` {teacher_V}; student and teacher must share their"
            " vocabulary. Cut padding off: teacher_weight[:V]."
        )
    if tokens != teacher_tokens:
        raise ValueError(
            f"`input` is of {tuple(tokens)} tokens and `teacher_input` of {tuple(teacher_tokens)}; they must be the"
            " same ones."
        )
    if student.input.device != teacher.input.device:
        raise ValueError(
            f"`input` is on {student.input.device} and `teacher_input` on {teacher.input.device}; bring both to one."
        )
    if student.shard.group or teacher.shard.group:
        raise ValueError("A head is cut into shards of the vocabulary; distillation takes it whole: full_tensor().")
    if student.main_grad is not None:
        raise ValueError(
            "`linear_weight` has a `main_grad`, into which distillation adds no gradient; pass a view of the weight,"
            " linear_weight.view_as(linear_weight), and add its gradient."
        )


def _flat_mask(mask: Tensor | None, tokens: torch.Size, device: torch.device) -> Tensor:
    if mask is None:
        return torch.ones(tokens.numel(), dtype=torch.bool, device=device)
    if mask.dtype != torch.bool or mask.shape != tokens:
        raise ValueError(f"`mask` is {mask.dtype} {tuple(mask.shape)}; it must be bool of shape {tuple(tokens)}.")
    return mask.reshape(-1)


def linear_head_topk_distillation(
    input: Tensor,
    linear_weight: Tensor,
    ids: Tensor,
    teacher_probs: Tensor,
    *,
    tail: Literal["merge", "drop"] = "merge",
    mask: Tensor | None = None,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Forward divergence from a teacher of whom the probabilities p of K entries a token are known.

    With q of the student, as in ``linear_head_logprobs``::

        drop     sum_k p_k (log p_k - log q_k)
        merge    the same + P (log P - log Q)    with P = 1 - sum_k p_k and Q = 1 - sum_k q_k

    All other entries together are one more class, or are left out. What is left out does not hold the student back:
    it learns the share of the known entries to be 1.

    Args:
        input: the student's hidden states, shape [..., D].
        linear_weight: its head, shape [V, D].
        ids: different entries of the vocabulary, int64, shape [..., K]: the teacher's likeliest ones.
        teacher_probs: the teacher's probabilities of them, shape [..., K], among all of its vocabulary or of these.
        tail: what becomes of the other entries.
        mask: tokens that count, bool [...]; None for all.
        linear_bias: the student's bias, shape [V].
        softcap: bound of the student's logits, a positive number.
        temperature: of the student, a positive number or one a token; the probabilities have the teacher's in them.
        token_weight: weight of each token, shape [...]; it stays out of the mean's denominator.
        reduction: ``"mean"`` over tokens that count, ``"sum"``, or ``"none"`` (0 at the others).
        num_items: replaces the denominator of the mean.
        impl: of the pass over the vocabulary: ``"triton"``, ``"torch"`` or ``"auto"``.

    Returns:
        The loss in float32 (float64 for float64 inputs) [nats]: a scalar, or shaped [...] for ``"none"``.

    Raises:
        ValueError: if shapes, dtypes or options do not fit, or, on a CPU, an id is outside the vocabulary.

    Example::

        >>> h, w = torch.zeros(1, 8), torch.randn(4, 8)
        >>> linear_head_topk_distillation(h, w, torch.tensor([[2, 3]]), torch.tensor([[0.5, 0.5]]))
        tensor(0.6931)
    """
    if tail not in ("merge", "drop"):
        raise ValueError(f"`tail` is {tail!r}; choose 'merge' or 'drop'.")
    check_reduction(reduction, num_items)
    if teacher_probs.shape != ids.shape or teacher_probs.requires_grad:
        raise ValueError(
            f"`teacher_probs` is {tuple(teacher_probs.shape)}; it must be shaped like `ids`, {tuple(ids.shape)}, and"
            " require no gradient."
        )
    tokens = input.shape[:-1]
    counts = _flat_mask(mask, tokens, input.device)
    options = {"linear_bias": linear_bias, "softcap": softcap, "temperature": temperature, "impl": impl}
    logq = linear_head_logprobs(input, linear_weight, ids, **options).flatten(0, -2)  # type: ignore[arg-type]
    p = teacher_probs.to(logq.dtype).flatten(0, -2)
    terms = torch.special.xlogy(p, p) - p * logq
    losses = torch.where(p == 0, 0, terms).sum(-1)
    if tail == "merge":
        least = torch.finfo(logq.dtype).eps  # what a rest of 1 is known to
        rest, student_rest = ((1 - x.sum(-1)).clamp(min=0) for x in (p, logq.exp()))
        losses = losses + torch.special.xlogy(rest, rest) - rest * student_rest.clamp(min=least).log()
    weights = row_weights(counts.long() - 1, None, reduction, num_items, token_weight, logq.dtype)
    # an ignored token's loss may be NaN, and so may its gradient
    losses = weights * losses.masked_fill(~counts, 0)
    return losses.view(tokens) if reduction == "none" else losses.sum()
