"""All options of the loss at once, drawn at random, against the formula with stored logits in float64."""

import contextlib
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from litropy.kernels.linear_head_fused import rows_that_fit
from litropy.losses import linear_cross_entropy
from litropy.testing import assert_within_budget

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# hidden states and head
SAME = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP64, FP64)]
MIXED = [(FP32, BF16), (BF16, FP32), (FP32, FP16), (FP64, FP32)]
STATS = ("logprob", "lse", "entropy", "varentropy", "collision", "entropy_drift", "max_logprob", "argmax", "rank")
LEAVES = ("input", "weight", "bias", "u", "low_rank")


class Case(NamedTuple):
    """What is passed, and how the reference has to see it."""

    leaves: dict[str, torch.Tensor]
    target: torch.Tensor
    options: dict[str, Any]
    autocast: bool
    cotangent: torch.Tensor

    @property
    def product_dtype(self):
        dtype = self.leaves["weight"].dtype
        return BF16 if self.autocast and dtype != FP64 else dtype  # autocast leaves float64 alone


@st.composite
def cases(draw, dtypes=SAME + MIXED, autocast=True, vocabularies=(1, 7, 60, 600, 1100), most_rows=40):
    """A case in which ``mode='fast'`` is drawn only where nothing rules it out."""
    input_dtype, dtype = draw(st.sampled_from(dtypes))
    # to bfloat16: PyTorch itself refuses to mix it with float16
    autocast = autocast and FP16 not in (input_dtype, dtype) and draw(st.integers(0, 4)) == 0
    # the eager twin's worst error is a fair yardstick in half precision only over enough numbers
    is_exact = {input_dtype, dtype} <= {FP32, FP64} and not autocast
    shape = draw(st.sampled_from(((most_rows // 2,), (2, most_rows // 2), (most_rows // 4, 2, 2))))
    if is_exact:
        shape = draw(st.sampled_from((shape, (), (1,), (0,), (3, 0), (5,))))
    D, V = draw(st.integers(1 if is_exact else 8, 20)), draw(st.sampled_from(vocabularies))
    R = draw(st.sampled_from((0, 0, 3)))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    scale = draw(st.sampled_from((0.3, 1.0, 6.0)))
    bias_dtype = draw(st.sampled_from((None, dtype, FP32 if dtype != FP64 else FP64)))
    leaves = {
        "input": torch.randn(*shape, D).to(input_dtype),
        "weight": (scale * torch.randn(V, D) / math.sqrt(D)).to(dtype),
        "bias": None if bias_dtype is None else torch.randn(V).to(bias_dtype),
        "u": torch.randn(*shape, R).to(input_dtype) if R else None,
        "low_rank": torch.randn(V, R).to(dtype) if R else None,
    }
    leaves = {name: x for name, x in leaves.items() if x is not None}
    if draw(st.booleans()):
        leaves = {name: strided(x) for name, x in leaves.items()}
    frozen = draw(st.sets(st.sampled_from(sorted(leaves)), max_size=len(leaves) - 1)) if draw(st.booleans()) else set()
    leaves = {name: x.requires_grad_(name not in frozen) for name, x in leaves.items()}
    ignore_index = draw(st.sampled_from((-100, 0)))
    target = torch.randint(V, shape)
    ignored = draw(st.sampled_from((0.0, 0.3, 1.0)))
    target = target.masked_fill(torch.rand(shape) < ignored, ignore_index)
    reduction = draw(st.sampled_from(("mean", "sum", "none")))
    exact = FP64 if dtype == FP64 else FP32
    options = {
        "reduction": reduction,
        "ignore_index": ignore_index,
        "label_smoothing": draw(st.sampled_from((0.0, 0.1, 1.0))),
        "z_loss": draw(st.sampled_from((0.0, 1e-2))),
        "softcap": draw(st.sampled_from((None, 5.0))),
        "temperature": draw(st.sampled_from((1.0, 0.7, "each", "scalar", "half"))),
        "weight": (torch.rand(V) * (torch.rand(V) < 0.8)).to(exact) if draw(st.booleans()) else None,
        "token_weight": torch.randn(shape) * (torch.rand(shape) < 0.8) if draw(st.booleans()) else None,
        "num_items": draw(st.sampled_from((None, 7.5, torch.tensor(50)))) if reduction == "mean" else None,
        "skip_tol": draw(st.sampled_from((0.0, 0.0, 1e-3))),
        "return_stats": tuple(draw(st.sets(st.sampled_from(STATS), max_size=4))),
        "memory_budget_mib": draw(st.sampled_from((1e-6, 0.002, 0.02, 64))),
    }
    each = 0.5 + torch.rand(shape)
    temperatures = {"each": each, "scalar": torch.tensor(0.8), "half": each.to(BF16)}
    if isinstance(options["temperature"], str):
        options["temperature"] = temperatures[options["temperature"]]
    if options["skip_tol"]:
        options["return_stats"] = tuple(name for name in options["return_stats"] if name != "rank")
    class_weight, valid = options["weight"], target != ignore_index
    if reduction == "mean" and class_weight is not None and options["num_items"] is None and valid.any():
        assume(class_weight[target[valid]].sum() > 0)  # the mean over classes without weight is 0 / 0, as in torch
    cotangent = torch.randn(*shape, 2)[..., 0] if reduction == "none" else torch.randn(())
    case = Case(leaves, target, options, autocast, cotangent)
    options["mode"] = draw(st.sampled_from(("auto", "lean", "fast") if may_be_fast(case) else ("auto", "lean")))
    return case


def strided(x):
    """The same numbers with other strides."""
    if x.ndim == 0 or not x.numel():
        return x
    return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]


def may_be_fast(case):
    options, dtype = case.options, case.product_dtype
    N, V = case.target.numel(), case.leaves["weight"].shape[0]
    return (
        options["reduction"] != "none"
        and not options["skip_tol"]
        and "rank" not in options["return_stats"]
        and FP16 not in (dtype, case.leaves["weight"].dtype)
        and (not N or bool(rows_that_fit(N, V, dtype, int(options["memory_budget_mib"] * 2**20))))
    )


def run(case, **changes):
    """The loss under test with its statistics and gradients."""
    leaves = {name: x.detach().requires_grad_(x.requires_grad) for name, x in case.leaves.items()}
    low_rank = (leaves["u"], leaves["low_rank"]) if "u" in leaves else None
    with torch.autocast("cpu", BF16) if case.autocast else contextlib.nullcontext():
        result = linear_cross_entropy(
            leaves["input"], leaves["weight"], case.target, linear_bias=leaves.get("bias"), low_rank=low_rank,
            **(case.options | changes),
        )  # fmt: skip
    loss, stats = result if case.options["return_stats"] else (result, None)
    return loss, stats, gradients(loss, leaves, case.cotangent)


def gradients(loss, leaves, cotangent):
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(loss, wanted.values(), cotangent.to(loss.dtype)), strict=True))


def stored(case, dtype):
    """The formula with stored logits: each token's loss, its weight, the reduced loss, statistics, gradients."""
    options = case.options
    to = (lambda x: x.double()) if dtype == FP64 else (lambda x: x)
    leaves = {name: to(x.detach()).requires_grad_(x.requires_grad) for name, x in case.leaves.items()}
    cast = {name: x.to(dtype) for name, x in leaves.items()}
    z = F.linear(cast["input"], cast["weight"], cast.get("bias"))
    if "u" in cast:
        z = z + F.linear(cast["u"], cast["low_rank"])
    z = z if dtype == FP64 else z.float()
    if options["softcap"]:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    temperature = options["temperature"]
    z = z / (temperature[..., None] if isinstance(temperature, torch.Tensor) else temperature)
    logp, lse = z.log_softmax(-1), z.logsumexp(-1)
    valid = case.target != options["ignore_index"]
    label = case.target.masked_fill(~valid, 0)
    picked = logp.gather(-1, label[..., None])[..., 0]
    c = z.new_ones(z.shape[-1]) if options["weight"] is None else options["weight"]
    smoothing = options["label_smoothing"]
    rows = -(1 - smoothing) * c[label] * picked - smoothing * (c * logp).mean(-1) + options["z_loss"] * lse**2
    rows = torch.where(valid, rows, 0)
    weight = valid.to(z.dtype) if options["token_weight"] is None else options["token_weight"].to(z.dtype)
    if options["reduction"] == "mean":
        items = options["num_items"]
        weight = weight / ((c[label] * valid).sum().clamp_min(1e-30) if items is None else items)
    weight = torch.where(valid, weight, 0)
    loss = weight * rows if options["reduction"] == "none" else (weight * rows).sum()
    # by how much a probability moves the loss
    reach = weight.abs() * ((1 - smoothing) * c[label] + smoothing * c.mean() + 2 * options["z_loss"] * lse.abs())
    p = logp.exp()
    entropy = -(p * logp).sum(-1)
    surplus = logp + entropy[..., None]
    stats = {
        "logprob": picked,
        "lse": lse,
        "entropy": entropy,
        "varentropy": (p * surplus**2).sum(-1),
        "collision": (p**2).sum(-1),
        "entropy_drift": (p**2 * surplus).sum(-1),
        "max_logprob": logp.amax(-1) if z.shape[-1] else lse,
        "argmax": z.argmax(-1),
        "rank": (z > z.gather(-1, label[..., None])).sum(-1),
    }
    stats = {name: torch.where(valid, value, 0).detach() for name, value in stats.items()}
    return rows.detach(), weight, loss, stats, gradients(loss, leaves, case.cotangent), reach.detach()


def check(case, **changes):
    """Every number within the error budget, plus what skipping may take."""
    loss, stats, got = run(case, **changes)
    twin_rows, _, twin, twin_stats, twins, _ = stored(case, case.product_dtype)
    rows, weight, truth, true_stats, truths, reach = stored(case, FP64)
    assert loss.dtype == (FP64 if case.product_dtype == FP64 else FP32)
    # a sum may be right by chance in the twin: what counts is the error of its terms
    terms = case.options["reduction"] != "none"
    worst = (twin_rows.double() - rows).abs().max() if rows.numel() else 0.0
    # one rounding of the greatest logit: over a few rows the twin may be lucky
    is_half = case.product_dtype in (BF16, FP16) and rows.numel() > 0
    rounding = torch.finfo(case.product_dtype).eps * float(true_stats["lse"].abs().max()) if is_half else 0.0
    slack = 1e-6 + rounding * float(weight.abs().sum() if terms else F.pad(weight.abs().flatten(), (0, 1)).max())
    slack += terms * float((weight.abs() * (2 * worst + 4 * torch.finfo(loss.dtype).eps * rows.abs())).sum())
    assert_within_budget("loss", loss.detach(), twin.detach(), truth.detach(), slack)
    for name in case.options["return_stats"]:
        value = getattr(stats, name)
        assert value.shape == case.target.shape, name
        assert not value.requires_grad, name
        if name in ("argmax", "rank"):
            assert value.dtype == torch.int64
            if case.product_dtype == FP64:
                assert torch.equal(value, true_stats[name]), name
        else:
            slack = 2e-6 + rounding * (4 if name == "varentropy" else 1) + 2e-5 * (name == "varentropy")
            assert_within_budget(name, value, twin_stats[name], true_stats[name], slack)
    assert set(got) == set(truths)
    skipped = skipped_bounds(case, reach * case.cotangent.abs())
    for name, gradient in got.items():
        assert gradient.dtype == case.leaves[name].dtype, name
        assert gradient.shape == case.leaves[name].shape, name
        slack = 1e-6 + skipped.get(name, 0.0)
        if case.product_dtype != gradient.dtype and truths[name].numel():  # one rounding of the products' dtype
            slack += torch.finfo(case.product_dtype).eps * float(truths[name].abs().max())
        assert_within_budget(f"gradient of {name}", gradient, twins[name], truths[name], slack)


def skipped_bounds(case, reach):
    """The greatest error of each gradient that ``skip_tol`` allows; reach is what a probability moves the loss by."""
    if not case.options["skip_tol"] or not reach.numel():
        return {}
    slope = 1 / case.options["temperature"]
    per_row = reach * slope * case.options["skip_tol"]
    longest = {name: x.detach().double().norm(dim=-1).max() for name, x in case.leaves.items() if x.ndim}
    bounds = {"input": per_row.max() * longest["weight"], "weight": per_row.sum() * longest["input"]}
    if "u" in case.leaves:
        bounds |= {"u": per_row.max() * longest["low_rank"], "low_rank": per_row.sum() * longest["u"]}
    return {name: float(bound) for name, bound in (bounds | {"bias": per_row.sum()}).items()}


@settings(deadline=None, max_examples=200, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases())
def test_any_options_together(case):
    check(case, impl="torch")


@settings(deadline=None, max_examples=10, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases(dtypes=[(FP32, FP32), (BF16, BF16), (FP32, BF16)], autocast=False, vocabularies=(7, 150), most_rows=20))
def test_any_options_together_in_triton(case):
    check(case, impl="triton")


@pytest.mark.parametrize("seed", range(6))
def test_compiled_without_graph_breaks(seed):
    """The same numbers under torch.compile, as they are used: with the statistics in the same graph."""
    dtype = (FP32, BF16)[seed % 2]
    torch.manual_seed(seed)
    N, D, V = 20, 16, 600
    target = torch.randint(V, (N,)).masked_fill(torch.rand(N) < 0.3, -100)
    rank = seed in (2, 5)
    leaves = {
        "input": torch.randn(N, D).to(dtype),
        "weight": (torch.randn(V, D) / math.sqrt(D)).to(dtype),
        "bias": torch.randn(V).to(dtype),
    }
    if rank:
        leaves |= {"u": torch.randn(N, 3).to(dtype), "low_rank": torch.randn(V, 3).to(dtype)}
    options = {
        "reduction": ("mean", "sum", "none")[seed % 3],
        "ignore_index": -100,
        "label_smoothing": 0.1 * (seed % 2),
        "z_loss": 1e-2 * (seed > 2),
        "softcap": 5.0 if seed % 3 == 1 else None,
        "temperature": 0.5 + torch.rand(N) if seed > 3 else 0.9,
        "weight": torch.rand(V) if seed > 1 else None,
        "token_weight": torch.rand(N) if seed % 2 else None,
        "num_items": torch.tensor(12) if seed % 3 == 0 else None,
        "skip_tol": 1e-3 * (seed == 2),
        "return_stats": ("entropy", "argmax"),
        "memory_budget_mib": (64, 0.02)[seed % 2],
    }
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    cotangent = torch.randn(N) if options["reduction"] == "none" else torch.randn(())
    case = Case(leaves, target, options, False, cotangent)

    def loss_and_entropy(leaves, target):
        low_rank = (leaves["u"], leaves["low_rank"]) if rank else None
        loss, stats = linear_cross_entropy(
            leaves["input"] * 1.0, leaves["weight"], target, linear_bias=leaves["bias"], low_rank=low_rank, **options
        )
        return loss * 1.0, stats.entropy

    compiled = torch.compile(loss_and_entropy, fullgraph=True, backend="aot_eager")
    loss, entropy = compiled(leaves, target)
    expected, stats, expected_gradients = run(case)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy, stats.entropy, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients(loss, leaves, cotangent).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-5, atol=1e-6)
    check(case)
