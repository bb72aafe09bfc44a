"""Which way a loss goes: gradient in the forward pass, or statistics and a backward pass that recomputes."""

from typing import Literal

import torch

from litropy.kernels.linear_head import Plan
from litropy.kernels.linear_head_fused import pays, rows_that_fit
from litropy.kernels.linear_head_types import Want
from litropy.losses.head_inputs import HeadInputs, log_once

__all__ = ["Mode", "choose_mode"]

Mode = Literal["auto", "fast", "lean"]


def choose_mode(mode: Mode, rows: HeadInputs, want: Want, plan: Plan, reduction: str) -> Literal["fast", "lean"]:
    """Choose ``"fast"`` where it is possible and, if the choice is free, pays.

    Raises:
        ValueError: if ``"fast"`` is asked for and something that is asked for as well rules it out.
    """
    factors = (rows.input, rows.head.weight, rows.head.bias, rows.head.low_rank)
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in factors)):
        return "lean"  # there is no gradient to form
    chosen: Literal["fast", "lean"] = "lean"
    if mode != "lean":
        obstacle = _obstacle(rows, want, plan, reduction)
        if mode == "fast":
            if obstacle:
                raise ValueError(
                    f"`mode` is 'fast', which forms gradients in the forward pass, but {obstacle}. Leave one of the two"
                    " out; mode='auto' chooses."
                )
            chosen = "fast"
        elif not obstacle:
            weight, num_rows = rows.head.weight, rows.input.shape[0]
            if pays(num_rows, weight.shape[0], plan.dtype, weight.dtype, weight.device.type, plan.budget):
                chosen = "fast"
    if not torch.compiler.is_compiling():
        log_once(f"linear head: {chosen} mode for {rows.head.weight.shape[0]} entries (mode={mode!r})")
    return chosen


def _obstacle(rows: HeadInputs, want: Want, plan: Plan, reduction: str) -> str | None:
    """What keeps gradients from being formed in the forward pass."""
    head = rows.head
    if reduction == "none":
        return "`reduction` is 'none': the weight of each token's loss comes with the backward pass"
    if plan.skip_tol:
        return "`skip_tol` is positive: what is skipped is a recomputation"
    if rows.shard.group:
        return "the vocabulary is sharded (`vocab_parallel_group`, or a DTensor): a row's sum is not known by block"
    if rows.main_grad is not None:
        return "`linear_weight` has a `main_grad`: it takes the gradient in the backward pass"
    if want.ranking:
        return "`return_stats` asks for the rank: it takes a pass of its own"
    if torch.float16 in (plan.dtype, head.weight.dtype):
        return "the head computes in float16: small gradients would be 0 before the loss scaler's factor arrives"
    num_rows, V = rows.input.shape[0], head.weight.shape[0]
    if num_rows and not rows_that_fit(num_rows, V, plan.dtype, plan.budget):
        # no format after a colon: torch.compile cannot trace it
        return f"not a single row of {V} logits fits `memory_budget_mib` = {plan.budget / 2**20}"
    return None
