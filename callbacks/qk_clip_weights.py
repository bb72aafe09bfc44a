"""Which rows of which weights make the queries and keys of a head, and scaling them.

Shape key: H query heads, Hkv key heads, D width of a head.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

__all__ = ["ScaledRows", "clip_factors", "has_qk_norm", "query_key_rows", "scale_rows"]

_QK_NORM = re.compile(r"(q|k|qk|query|key|q_b)_?(layer)?_?norms?")
_PAIRS = (("q_proj", "k_proj"), ("query", "key"), ("q", "k"), ("query_proj", "key_proj"), ("q_lin", "k_lin"))
# one layer for all, whose order a name does not tell: first the queries of all heads, then keys, then values
_STACKED = {"GPT2": "c_attn", "Phi3": "qkv_proj", "Phi4": "qkv_proj", "ModernBert": "Wqkv", "Mpt": "Wqkv"}
# for each head its query, its key, its value
_INTERLEAVED = {"GPTNeoX": "query_key_value", "Bloom": "query_key_value"}


@dataclass(frozen=True, eq=False)
class ScaledRows:
    """Rows of a weight (and bias) that follow the clipping of heads.

    Attributes:
        owner: module that has the weight.
        weight: the weight's name there.
        bias: the bias's name there.
        heads: query head of each output row, [out].
        powers: power of the head's factor that each row is multiplied by, [out]; 0 leaves a row as it is.
    """

    owner: nn.Module
    weight: str
    bias: str
    heads: Tensor
    powers: Tensor

    def to(self, device: torch.device) -> "ScaledRows":
        """The same with its tensors on a device."""
        return replace(self, heads=self.heads.to(device), powers=self.powers.to(device))


def clip_factors(max_logit: Tensor, tau: float) -> Tensor:
    r"""Factor that brings each head's largest logit down to tau, :math:`\min(1, \tau / S_\max)`.

    Args:
        max_logit: largest logits; where one is not finite, the factor is 1.
        tau: the limit.

    Example::

        >>> clip_factors(torch.tensor([50.0, 200.0, torch.inf]), tau=100.0)
        tensor([1.0000, 0.5000, 1.0000])
    """
    return torch.where(max_logit.isfinite() & (max_logit > tau), tau / max_logit, 1.0)


def has_qk_norm(module: nn.Module) -> bool:
    """Whether an attention module normalises queries or keys, which undoes any scaling of weights before it.

    Example::

        >>> has_qk_norm(nn.ModuleDict({"q_proj": nn.Linear(2, 2), "q_norm": nn.LayerNorm(2)}))
        True
    """
    return any(
        _QK_NORM.fullmatch(name) and not isinstance(child, nn.Identity) for name, child in module.named_children()
    )


def query_key_rows(module: Any, num_heads: int) -> list[ScaledRows]:
    r"""Find the rows that make queries and keys of an attention module, and how clipping scales them.

    A head's logits become :math:`\gamma` times as large if its queries and keys become :math:`\sqrt\gamma` times as
    large. Where heads share keys (GQA), queries alone take :math:`\gamma`, so that other heads stay as they are. In
    multi-head latent attention that holds for the rotary part, whose key all heads share.

    Args:
        module: the attention module.
        num_heads: of queries.

    Raises:
        ValueError: if the module is not understood, or its weights cannot be scaled.

    Example::

        >>> attention = nn.ModuleDict({"q_proj": nn.Linear(8, 4), "k_proj": nn.Linear(8, 4)})
        >>> [(rows.heads.tolist(), rows.powers.tolist()) for rows in query_key_rows(attention, num_heads=2)]
        [([0, 0, 1, 1], [0.5, 0.5, 0.5, 0.5]), ([0, 0, 1, 1], [0.5, 0.5, 0.5, 0.5])]
    """
    children = dict(module.named_children())
    if "kv_b_proj" in children:
        found = _latent(module, children, num_heads)
    elif isinstance(module, nn.MultiheadAttention):
        found = _of_torch(module, num_heads)
    elif pair := next((pair for pair in _PAIRS if set(pair) <= children.keys()), None):
        found = _separate(module, children[pair[0]], children[pair[1]], num_heads)
    elif (fused := _fused(module, children, _STACKED)) is not None and "q_attn" not in children:
        found = _stacked(module, fused, num_heads)
    elif (fused := _fused(module, children, _INTERLEAVED)) is not None:
        width = _divide(module, _rows(fused), 3 * num_heads)
        powers = torch.tensor([0.5, 0.5, 0.0]).repeat_interleave(width).repeat(num_heads)
        found = [_on(fused, torch.arange(num_heads).repeat_interleave(3 * width), powers)]
    else:
        raise _not_understood(module)
    for rows in found:
        _check_scalable(module, rows)
    return found


def _fused(module: nn.Module, children: dict[str, nn.Module], kinds: dict[str, str]) -> nn.Module | None:
    kind = type(module).__name__
    return next((children.get(name) for prefix, name in kinds.items() if kind.startswith(prefix)), None)


def _separate(module: nn.Module, query: nn.Module, key: nn.Module, num_heads: int) -> list[ScaledRows]:
    width = _divide(module, _rows(query), num_heads)
    key_heads = _divide(module, _rows(key), width)
    heads = torch.arange(num_heads).repeat_interleave(width)
    if key_heads != num_heads:
        return [_on(query, heads, torch.ones(len(heads)))]
    return [_on(part, heads, torch.full((len(heads),), 0.5)) for part in (query, key)]


def _stacked(module: nn.Module, fused: nn.Module, num_heads: int) -> list[ScaledRows]:
    width = getattr(module, "head_dim", None) or _divide(module, _rows(fused), 3 * num_heads)
    queries = num_heads * width
    keys = _divide(module, _rows(fused) - queries, 2)
    alone = keys == queries
    powers = torch.tensor([0.5 if alone else 1.0, 0.5 if alone else 0.0, 0.0])
    heads = torch.arange(num_heads).repeat_interleave(width)
    heads = torch.cat([heads, heads if alone else torch.zeros(keys, dtype=torch.int64), torch.zeros(keys).long()])
    return [_on(fused, heads, powers.repeat_interleave(torch.tensor([queries, keys, keys])))]


def _of_torch(module: nn.MultiheadAttention, num_heads: int) -> list[ScaledRows]:
    if module.in_proj_weight is None:
        raise _not_understood(module)
    heads = torch.arange(num_heads).repeat_interleave(module.head_dim).repeat(3)
    powers = torch.tensor([0.5, 0.5, 0.0]).repeat_interleave(module.embed_dim)
    return [ScaledRows(module, "in_proj_weight", "in_proj_bias", heads, powers)]


def _latent(module: Any, children: dict[str, nn.Module], num_heads: int) -> list[ScaledRows]:
    """Multi-head latent attention: content parts by the root, rotary queries by the whole factor."""
    query = children.get("q_b_proj", children.get("q_proj"))
    if query is None:
        raise _not_understood(module)
    content, rotary, value = module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim
    found = []
    for part, sizes, powers in (
        (query, [content, rotary], [0.5, 1.0]),
        (children["kv_b_proj"], [content, value], [0.5, 0.0]),
    ):
        if _rows(part) != num_heads * sum(sizes):
            raise _not_understood(module)
        one_head = torch.tensor(powers).repeat_interleave(torch.tensor(sizes))
        found.append(_on(part, torch.arange(num_heads).repeat_interleave(sum(sizes)), one_head.repeat(num_heads)))
    return found


def _on(layer: nn.Module, heads: Tensor, powers: Tensor) -> ScaledRows:
    return ScaledRows(layer, "weight", "bias", heads, powers)


def _rows(layer: Any) -> int:
    """Outputs of a linear layer, 0 if it is something else."""
    if isinstance(layer, Conv1D):
        return layer.nf
    return layer.out_features if isinstance(layer, nn.Linear) else 0


def _divide(module: nn.Module, size: int, parts: int) -> int:
    if size <= 0 or size % parts:
        raise _not_understood(module)
    return size // parts


def _not_understood(module: nn.Module) -> ValueError:
    layers = [f"{name} ({type(child).__name__})" for name, child in module.named_children()]
    pairs, kinds = ", ".join(map("/".join, _PAIRS)), ", ".join([*_STACKED, *_INTERLEAVED])
    return ValueError(
        f"QKClip does not know which weights make queries and keys in {type(module).__name__}, with"
        f" {', '.join(layers) or 'no layers'}. It knows separate linear layers ({pairs}), the fused ones of {kinds},"
        " nn.MultiheadAttention and multi-head latent attention."
    )


def _check_scalable(module: nn.Module, rows: ScaledRows) -> None:
    kind = type(module).__name__
    if is_parametrized(rows.owner, rows.weight):
        raise ValueError(
            f"QKClip cannot scale single heads in {kind}, whose weights are reparametrised. SigmaReparam already keeps"
            " logits small: use one of the two."
        )
    if not getattr(rows.owner, rows.weight).requires_grad:
        raise ValueError(f"QKClip would change weights of {kind} that are frozen. Train them, or leave QKClip out.")


@torch.no_grad()
def scale_rows(rows: ScaledRows, factors: Tensor) -> None:
    """Multiply rows of weight and bias by powers of their heads' factors, in place; both may be sharded.

    Args:
        rows: which rows.
        factors: of each query head, [H], on the same device.
    """
    row_factors = factors[rows.heads] ** rows.powers
    weight, bias = getattr(rows.owner, rows.weight), getattr(rows.owner, rows.bias, None)
    _multiply(weight, row_factors if isinstance(rows.owner, Conv1D) else row_factors[:, None])
    if bias is not None:
        _multiply(bias, row_factors)


def _multiply(parameter: Tensor, factors: Tensor) -> None:
    factors = factors.to(parameter.dtype)
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        factors = DTensor.from_local(factors, mesh, [Replicate()] * mesh.ndim, run_check=False)
    parameter.mul_(factors)
