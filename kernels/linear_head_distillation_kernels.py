"""Triton kernel of distillation: a program owns a row of logits of two models and turns one into its gradient.

Shape key: n rows of a block, V vocabulary.
"""

import triton
import triton.language as tl

from litropy.kernels.linear_head_triton_kernels import _final

__all__ = ["distillation_kernel"]


@triton.jit
def _logits(row, v, V, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Final logits [1, v] of a row, -inf behind its end, and d final / d raw."""
    raw = tl.load(row + v, mask=v < V, other=0.0).to(tl.float32)
    z, slope = _final(raw[None, :], scale, softcap, HAS_SOFTCAP)
    return tl.where((v < V)[None, :], z, -float("inf")), slope


@triton.jit
def _add_mass(z, m, s):
    """Merge logits [1, v] into a row's maximum and its sum of exp(z - m)."""
    top = tl.maximum(m, tl.max(z, 1))
    centre = tl.where(top == -float("inf"), 0.0, top)
    return top, s * tl.exp(m - centre) + tl.sum(tl.exp(z - centre[:, None]), 1)


@triton.jit
def _log_add_exp(a, b):
    """``log(e^a + e^b)``."""
    largest = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    return largest + tl.log(1.0 + tl.exp(tl.minimum(a, b) - largest))


@triton.jit
def _scores(log_q, log_p, log_beta, log_rest, DIVERGENCE: tl.constexpr):
    """By what the student's probability of each entry is weighted in the divergence, and by what the teacher's."""
    gap = log_p - log_q
    score_q, score_p = tl.zeros_like(gap), tl.zeros_like(gap)
    if DIVERGENCE == 0:  # forward: sum p gap
        score_p = gap
    if DIVERGENCE == 1:  # reverse: - sum q gap
        score_q = -gap
    if DIVERGENCE == 2:  # Jensen-Shannon: log q - log m and log p - log m with m = beta p + (1 - beta) q
        score_q = -_log_add_exp(gap + log_beta, log_rest)
        score_p = -_log_add_exp(log_beta, log_rest - gap)
    return score_q, score_p


@triton.jit
def distillation_kernel(
    logits_ptr, teacher_logits_ptr, row_weight_ptr, mask_ptr, scale_ptr, teacher_scale_ptr, loss_ptr,
    V, stride_logits, stride_teacher, softcap, teacher_softcap, inv_temperature, teacher_inv_temperature,
    beta, log_beta, log_rest,
    HAS_SOFTCAP: tl.constexpr, HAS_TEACHER_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_TEACHER_SCALE: tl.constexpr, WANT_GRADIENT: tl.constexpr, DIVERGENCE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Store a row's divergence, and turn its raw logits [V] into the gradient of the weighted one in place."""
    n = tl.program_id(0).to(tl.int64)
    row, teacher_row = logits_ptr + n * stride_logits, teacher_logits_ptr + n * stride_teacher
    one = tl.arange(0, 1)
    scale = tl.zeros((1,), dtype=tl.float32) + inv_temperature
    if HAS_SCALE:
        scale = tl.load(scale_ptr + n + one)
    teacher_scale = tl.zeros((1,), dtype=tl.float32) + teacher_inv_temperature
    if HAS_TEACHER_SCALE:
        teacher_scale = tl.load(teacher_scale_ptr + n + one)
    zero = tl.zeros((1,), dtype=tl.float32)
    m_q, m_p = zero - float("inf"), zero - float("inf")
    s_q, s_p = zero, zero
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z, _ = _logits(row, v, V, scale, softcap, HAS_SOFTCAP)
        y, _ = _logits(teacher_row, v, V, teacher_scale, teacher_softcap, HAS_TEACHER_SOFTCAP)
        m_q, s_q = _add_mass(z, m_q, s_q)
        m_p, s_p = _add_mass(y, m_p, s_p)
    log_s_q, log_s_p = tl.log(s_q), tl.log(s_p)
    # of the student's scores, and of the teacher's
    mean_q, mean_p = zero, zero
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z, _ = _logits(row, v, V, scale, softcap, HAS_SOFTCAP)
        y, _ = _logits(teacher_row, v, V, teacher_scale, teacher_softcap, HAS_TEACHER_SOFTCAP)
        log_q, log_p = (z - m_q[:, None]) - log_s_q[:, None], (y - m_p[:, None]) - log_s_p[:, None]
        score_q, score_p = _scores(log_q, log_p, log_beta, log_rest, DIVERGENCE)
        q, p = tl.exp(log_q), tl.exp(log_p)
        # an entry without probability counts nothing, whatever its score
        mean_q += tl.sum(tl.where(q == 0.0, 0.0, q * score_q), 1)
        mean_p += tl.sum(tl.where(p == 0.0, 0.0, p * score_p), 1)
    counts = tl.load(mask_ptr + n) != 0
    loss = beta * mean_p + (1.0 - beta) * mean_q
    tl.store(loss_ptr + n + one, tl.where(counts, loss, 0.0))
    if WANT_GRADIENT:
        weight = tl.load(row_weight_ptr + n)
        for start in range(0, V, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            z, slope = _logits(row, v, V, scale, softcap, HAS_SOFTCAP)
            y, _ = _logits(teacher_row, v, V, teacher_scale, teacher_softcap, HAS_TEACHER_SOFTCAP)
            log_q, log_p = (z - m_q[:, None]) - log_s_q[:, None], (y - m_p[:, None]) - log_s_p[:, None]
            q = tl.exp(log_q)
            if DIVERGENCE == 0:
                dz = q - tl.exp(log_p)
            else:
                score_q, _ = _scores(log_q, log_p, log_beta, log_rest, DIVERGENCE)
                dz = tl.where(q == 0.0, 0.0, (1.0 - beta) * q * (score_q - mean_q[:, None]))
            dz = tl.where(counts, dz * slope * weight, 0.0)
            tl.store((row + v)[None, :], dz.to(logits_ptr.dtype.element_ty), mask=(v < V)[None, :])
