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
    needs_gpu: bool = False
    # ours: the share of a row's softmax mass that the backward pass may leave out
    skip_tol: float = 0.0


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


def _liger(chunk_mem_const: int) -> Callable[[], LossFunction]:
    def make() -> LossFunction:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss

        return lambda input, weight, target: loss(input, weight, target, chunk_mem_const=chunk_mem_const)

    return make


def _liger_scaled() -> LossFunction:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return lambda input, weight, target: LigerFusedLinearScaledCrossEntropyFunction.apply(input, weight, target).mean()


def _quack(use_scaled_exp: bool) -> Callable[[], LossFunction]:
    def make() -> LossFunction:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy as loss

        return lambda input, weight, target: loss(input, weight, target, use_scaled_exp=use_scaled_exp)

    return make


def _verl() -> LossFunction:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    # its statistics are (log-probability, entropy) of each token
    return lambda input, weight, target: -linear_cross_entropy(input, weight, target, 1.0, "none")[0].mean()


def _litropy(**options: object) -> Callable[[], LossFunction]:
    def make() -> LossFunction:
        from litropy.losses import linear_cross_entropy

        def loss(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            result = linear_cross_entropy(input, weight, target, **options)
            return result[0] if isinstance(result, tuple) else result

        return loss

    return make


def _litropy_skipping(skip_tol: float) -> Implementation:
    return Implementation(f"litropy, skip_tol {skip_tol:g}", _litropy(skip_tol=skip_tol), skip_tol=skip_tol)


STATISTICS = ("entropy", "varentropy", "collision", "argmax")
NAIVE = "F.linear + F.cross_entropy"
IMPLEMENTATIONS = [
    Implementation("litropy", _litropy()),
    Implementation("litropy, lean", _litropy(mode="lean")),
    Implementation("litropy, with 4 statistics", _litropy(return_stats=STATISTICS)),
    _litropy_skipping(1e-3),
    _litropy_skipping(1e-2),
    Implementation(NAIVE, _naive),
    Implementation("F.linear + F.cross_entropy, torch.compile", _compiled, compiles=True),
    Implementation("F.linear_cross_entropy, chunked", _torch_chunked),
    Implementation("cut-cross-entropy", _cut_cross_entropy(), needs_gpu=True),
    Implementation("cut-cross-entropy, no filter", _cut_cross_entropy(filter_eps=None), needs_gpu=True),
    Implementation("cut-cross-entropy, cce_exact", _cut_cross_entropy(impl="cce_exact"), needs_gpu=True),
    Implementation("cut-cross-entropy, torch_compile", _cut_cross_entropy(impl="torch_compile"), compiles=True),
    Implementation("liger-kernel", _liger(chunk_mem_const=1), needs_gpu=True),
    Implementation("liger-kernel, chunks of 16 times the memory", _liger(chunk_mem_const=16), needs_gpu=True),
    Implementation("liger-kernel, scaled cross-entropy", _liger_scaled),
    Implementation("quack-kernels", _quack(use_scaled_exp=False), needs_gpu=True),
    Implementation("quack-kernels, scaled exponentials", _quack(use_scaled_exp=True), needs_gpu=True),
    Implementation("verl", _verl, needs_gpu=True),
]


def named(name: str) -> Implementation:
    """Find an implementation."""
    return next(implementation for implementation in IMPLEMENTATIONS if implementation.name == name)
