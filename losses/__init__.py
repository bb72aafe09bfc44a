"""Losses and row statistics of a linear head whose logits are never stored."""

from litropy.losses.cut_cross_entropy import CutCrossEntropyLoss, linear_cross_entropy
from litropy.losses.distillation import linear_head_distillation, linear_head_topk_distillation
from litropy.losses.linear_head import HeadStats, linear_head_stats
from litropy.losses.selected import linear_head_logprobs

__all__ = [
    "CutCrossEntropyLoss",
    "HeadStats",
    "linear_cross_entropy",
    "linear_head_distillation",
    "linear_head_logprobs",
    "linear_head_stats",
    "linear_head_topk_distillation",
]
