"""Problems for the linear head, solved by it and by stored logits: what its tests share.

Everything is compared three ways: ours, the eager twin in the same dtype, and float64.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from litropy.kernels.linear_head import Plan, linear_head_rows
from litropy.kernels.linear_head_reference import linear_head_reference
from litropy.kernels.linear_head_types import Cotangents, Head, Want
from litropy.testing import assert_within_budget

IMPLS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BUDGET = 64 << 20
STREAMED = Want(
    entropy=True, mean_logprob=True, argmax=True, varentropy=True, collision=True, entropy_drift=True
)  # everything that takes no whole rows
SHAPES = [
    (1, 1, 1),  # the smallest there is
    (5, 7, 3),  # smaller than any tile
    (67, 33, 301),  # divisible by nothing, several tiles each way
    (130, 70, 129),  # one more than a tile
]


@dataclass(frozen=True)
class Problem:
    """Hidden states, head and targets; ``options`` are those of the reference."""

    input: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor | None
    bias: torch.Tensor | None = None
    u: torch.Tensor | None = None  # input of the low-rank addition
    low_rank: torch.Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self):
        return self.weight.dtype

    def leaves(self, dtype=None):
        """Fresh leaves by name, those that there are."""
        tensors = {name: getattr(self, name) for name in ("input", "weight", "bias", "u", "low_rank")}
        return {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in tensors.items() if x is not None}

    def but(self, **changes):
        """The same with other tensors or options."""
        own = {name: value for name, value in changes.items() if name in Problem.__dataclass_fields__}
        options = {name: value for name, value in changes.items() if name not in own}
        return replace(self, **own, options=self.options | options)


def make_problem(N, D, V, dtype=torch.float32, device="cpu", bias=True, scale=1.0, ignored=True, rank=0, **options):
    """Random normal numbers; logits of about the size ``scale``; every third row ignored."""
    target = torch.randint(V, (N,), device=device)
    if ignored and N > 2:
        target[1::3] = -1
    return Problem(
        input=torch.randn(N, D, device=device).to(dtype),
        weight=(scale * torch.randn(V, D, device=device) / math.sqrt(D)).to(dtype),
        target=target,
        bias=torch.randn(V, device=device).to(dtype) if bias else None,
        u=torch.randn(N, rank, device=device).to(dtype) if rank else None,
        low_rank=(torch.randn(V, rank, device=device) / math.sqrt(rank)).to(dtype) if rank else None,
        options=options,
    )


def exact_problem(N, D, V, dtype=torch.float32, device="cpu", **options):
    """Small integers, whose logits are exact in every dtype: ties are ties, and every computation ranks alike."""
    return Problem(
        input=torch.randint(-1, 2, (N, D), device=device).to(dtype),
        weight=torch.randint(-2, 3, (V, D), device=device).to(dtype),
        target=torch.randint(V, (N,), device=device),
        bias=torch.randint(-3, 4, (V,), device=device).to(dtype),
        options=options,
    )


def head_of(leaves, temperature=1.0, softcap=None, mean_weight=None, **_):
    """The head that the kernels take."""
    per_row = isinstance(temperature, torch.Tensor)
    return Head(
        leaves["weight"],
        leaves.get("bias"),
        leaves.get("low_rank"),
        mean_weight,
        None if mean_weight is None else mean_weight.sum(),
        temperature.reciprocal() if per_row else None,
        1.0 if per_row else 1 / temperature,
        softcap or 0.0,
    )


def solve(problem, impl, want=STREAMED, budget=BUDGET, skip_tol=0.0):
    """Statistics and kept tiles by the kernels, and the leaves that they depend on."""
    leaves = problem.leaves()
    input = torch.cat([leaves["input"], leaves["u"]], 1) if "u" in leaves else leaves["input"]
    head = head_of(leaves, **problem.options)
    stats, kept = linear_head_rows(input, head, problem.target, want, Plan(impl, problem.dtype, budget, skip_tol))
    return stats, kept, leaves


def solve_stored(problem, want=STREAMED, dtype=torch.float64):
    """Statistics from stored logits, and the leaves that they depend on."""
    leaves = problem.leaves(dtype)
    low_rank = (leaves["u"], leaves["low_rank"]) if "u" in leaves else None
    stats = linear_head_reference(
        leaves["input"],
        leaves["weight"],
        leaves.get("bias"),
        problem.target,
        low_rank=low_rank,
        top_k=want.top_k or 1,
        top_p=want.top_p or 1.0,
        open_nucleus=want.open_nucleus,
        **problem.options,
    )
    return stats, leaves


def exact_logits(problem):
    """Final logits in float64, [N, V]."""
    z = problem.input.double() @ problem.weight.double().t()
    if problem.bias is not None:
        z = z + problem.bias.double()
    if problem.u is not None:
        z = z + problem.u.double() @ problem.low_rank.double().t()
    softcap, temperature = problem.options.get("softcap"), problem.options.get("temperature", 1.0)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    return z / (temperature[:, None].double() if isinstance(temperature, torch.Tensor) else temperature)


def well_separated(problem, top_p, distance=1e-5):
    """Without the rows in which the mass of some likeliest entries is so near ``top_p`` that rounding decides."""
    z = exact_logits(problem)
    mass = z.sort(1, descending=True).values.softmax(1).cumsum(1)
    clear = ((mass - top_p).abs() > distance).all(1) | (top_p == 1)
    assert clear.sum() >= len(clear) // 2
    temperature = problem.options.get("temperature")
    if isinstance(temperature, torch.Tensor):
        problem = problem.but(temperature=temperature[clear])
    return problem.but(input=problem.input[clear], target=problem.target[clear])


def differentiable(want, has_target=True):
    """Names of the statistics that have a gradient."""
    names = [name for name in ("entropy", "mean_logprob", "varentropy") if getattr(want, name)]
    return ["lse", *names, *(["logprob"] if has_target else []), *(["nucleus_entropy"] if want.top_p else [])]


def values(want, has_target=True):
    """Names of all real-valued statistics."""
    names = [name for name in ("collision", "entropy_drift") if getattr(want, name)]
    names += ["topk_entropy", "topk_mass"] if want.top_k else []
    return ["max_logprob", *names, *differentiable(want, has_target)]


def gradients(stats, leaves, cotangents):
    """Gradients of the sum of statistics times cotangents, for each leaf."""
    pick = stats.get if isinstance(stats, dict) else lambda name: getattr(stats, name)
    total = sum((pick(name) * g.to(pick(name).dtype)).sum() for name, g in cotangents.items())
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def check(problem, impl, want=STREAMED, budget=BUDGET, only=None):
    """Hold every statistic and every gradient to the error budget; ``only`` names the statistics with cotangents."""
    has_target = problem.target is not None
    assert set(Cotangents._fields) >= set(differentiable(want, has_target))
    ours, _, leaves = solve(problem, impl, want, budget)
    twin, twin_leaves = solve_stored(problem, want, problem.dtype)
    truth, true_leaves = solve_stored(problem, want)
    for name in values(want, has_target):
        assert_within_budget(name, getattr(ours, name), twin[name].detach(), truth[name].detach())
    names = only or differentiable(want, has_target)
    cotangents = {name: torch.randn_like(ours.lse) for name in names}
    got, twins, truths = (
        gradients(stats, x, cotangents) for stats, x in ((ours, leaves), (twin, twin_leaves), (truth, true_leaves))
    )
    slack = 1e-6 + (varentropy_allowance(truth) if "varentropy" in names else 0.0)
    for name in leaves:
        assert_within_budget(f"gradient of {name}", got[name], twins[name], truths[name], slack)
    return ours, truth


def varentropy_allowance(truth):
    """Its gradient holds the square of a surprisal less the varentropy, and has the digits of the greater one."""
    moment = truth["varentropy"] + (truth["entropy"] + truth["max_logprob"]).square()
    return torch.finfo(torch.float32).eps * float(moment.detach().max()) if moment.numel() else 0.0
