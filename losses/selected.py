"""Log-probabilities of chosen entries of the vocabulary, several a row."""

import torch
from torch import Tensor

from litropy.kernels.selected_logits import selected_logits
from litropy.losses.head_inputs import Impl
from litropy.losses.linear_head import linear_head_stats

__all__ = ["linear_head_logprobs"]


def linear_head_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    ids: Tensor,
    *,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    impl: Impl = "auto",
) -> Tensor:
    """Log-probabilities of K chosen entries a row under ``softmax(input @ linear_weight.T + linear_bias)``.

    ``log p_k = z_k - lse``, with z as in ``linear_head_stats``: one pass over the vocabulary for the log-sum-exp, and K
    dot products a row. For the target alone, ``linear_head_stats`` needs no more than its pass. Differentiable with
    respect to input, weight and bias.

    Args:
        input: hidden states, shape [..., D].
        linear_weight: head weight, shape [V, D].
        ids: entries of the vocabulary, int64, shape [..., K]: a teacher's likeliest ones, say.
        linear_bias: head bias, shape [V].
        softcap: bound of the logits, a positive number.
        temperature: a positive number, or one a row, shape [...]; no gradient flows to it.
        impl: of the pass over the vocabulary: ``"triton"``, ``"torch"`` or ``"auto"``.

    Returns:
        Log-probabilities, shape [..., K], float32 (float64 for float64 inputs) [nats].

    Raises:
        ValueError: if shapes, dtypes or options do not fit, or, on a CPU, an id is outside the vocabulary.

    Example::

        >>> h, w = torch.zeros(2, 8), torch.randn(4, 8)
        >>> linear_head_logprobs(h, w, torch.tensor([[0, 3], [1, 1]]))
        tensor([[-1.3863, -1.3863],
                [-1.3863, -1.3863]])
    """
    if ids.dtype != torch.int64 or ids.shape[:-1] != input.shape[:-1]:
        raise ValueError(
            f"`ids` is {ids.dtype} {tuple(ids.shape)}; it must be int64 of shape {(*input.shape[:-1], 'K')}."
        )
    options = {"linear_bias": linear_bias, "softcap": softcap, "temperature": temperature}
    lse = linear_head_stats(input, linear_weight, stats=("lse",), impl=impl, **options).lse  # type: ignore[arg-type]
    assert lse is not None
    device = input.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else linear_weight.dtype
    flat = ids.reshape(-1, ids.shape[-1])
    z = selected_logits(input.reshape(-1, input.shape[-1]).to(dtype), linear_weight.to(dtype), flat).view(ids.shape)
    if linear_bias is not None:
        z = z + linear_bias.to(dtype)[ids]
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature[..., None] if isinstance(temperature, Tensor) and temperature.ndim else temperature)
    return z.to(lse.dtype) - lse[..., None]
