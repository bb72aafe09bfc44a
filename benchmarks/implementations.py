"""Everything that is compared on the linear head: a name, and how to get a loss from hidden states, weight and targets.

``make`` imports what it needs, so that a peer that is missing says so instead of disappearing from the results.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Implementation:
    """One contender; ``make()`` returns its mean loss of (input [N, D], weight [V, D], target [N])."""

    name: str
    make: Callable[[], LossFunction]
    # torch.compile specialises on the shape: measuring its memory needs a warm-up at the very shape
    compiles: bool = False


def _naive() -> LossFunction:
    return lambda input, weight, target: F.cross_entropy(F.linear(input, weight), target)


def _compiled() -> LossFunction:
    return torch.compile(_naive(), dynamic=False)


def _torch_chunked() -> LossFunction:
    from torch.nn import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions()
    return lambda input, weight, target: F.linear_cross_entropy(input, weight, target, options=options)


def _cut_cross_entropy(**options: object) -> Callable[[], LossFunction]:
    def make() -> LossFunction:
        from cut_cross_entropy import linear_cross_entropy

        return lambda input, weight, target: linear_cross_entropy(input, weight, target, **options)

    return make


def _liger() -> LossFunction:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda input, weight, target: liger_fused_linear_cross_entropy(input, weight, target)


def _litropy(**options: object) -> Callable[[], LossFunction]:
    def make() -> LossFunction:
        from litropy.losses import linear_cross_entropy

        def loss(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            result = linear_cross_entropy(input, weight, target, **options)
            result = result[0] if isinstance(result, tuple) else result
            return result.mean()

        return loss

    return make


IMPLEMENTATIONS = [
    Implementation("litropy", _litropy()),
    Implementation("litropy, with entropy and argmax", _litropy(return_stats=("entropy", "argmax"))),
    Implementation("litropy, reduction none", _litropy(reduction="none")),
    Implementation("F.linear + F.cross_entropy", _naive),
    Implementation("F.linear + F.cross_entropy, torch.compile", _compiled, compiles=True),
    Implementation("F.linear_cross_entropy, chunked", _torch_chunked),
    Implementation("cut-cross-entropy", _cut_cross_entropy()),
    Implementation("cut-cross-entropy, no filter", _cut_cross_entropy(filter_eps=None)),
    Implementation("cut-cross-entropy, torch_compile", _cut_cross_entropy(impl="torch_compile"), compiles=True),
    Implementation("liger-kernel", _liger),
]
NAIVE = "F.linear + F.cross_entropy"


def named(name: str) -> Implementation:
    """Find an implementation."""
    return next(implementation for implementation in IMPLEMENTATIONS if implementation.name == name)
