"""Distillation against stored logits: values, gradients, options, memory, errors."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from litropy.losses import linear_head_distillation, linear_head_topk_distillation
from litropy.losses.head_inputs import prepare
from litropy.testing import assert_within_budget

IMPLS = ["torch", "triton"]
KINDS = ["forward_kl", "reverse_kl", "jsd"]
N, D, TEACHER_D, V = 9, 12, 7, 75
NAMES = ("input", "weight", "bias")


def problem(dtype=torch.float32, device="cpu", scale=1.0):
    """Leaves of the student, and the teacher's input, weight and bias."""
    shapes = ((N, D), (V, D), (V,), (N, TEACHER_D), (V, TEACHER_D), (V,))
    tensors = [scale * torch.randn(shape, device=device) for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in tensors[:3]], [x.to(dtype) for x in tensors[3:]]


def eager(leaves, teacher, dtype, kind, beta=0.5, softcaps=(None, None), temperature=1.0):
    """Each row's divergence from stored logits, with fresh leaves in a dtype."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]

    def logprobs(h, w, b, softcap):
        z = F.linear(h, w, b)
        z = z if z.dtype == torch.float64 else z.float()
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return (
            z / (temperature.to(z.dtype)[:, None] if isinstance(temperature, torch.Tensor) else temperature)
        ).log_softmax(-1)

    q, p = logprobs(*leaves, softcaps[0]), logprobs(*(x.to(dtype) for x in teacher), softcaps[1])
    if kind == "forward_kl":
        return leaves, (p.exp() * (p - q)).sum(-1)
    if kind == "reverse_kl":
        return leaves, (q.exp() * (q - p)).sum(-1)
    m = (beta * p.exp() + (1 - beta) * q.exp()).log()
    return leaves, (beta * p.exp() * (p - m) + (1 - beta) * q.exp() * (q - m)).sum(-1)


def ours(leaves, teacher, **options):
    h, w, b = leaves
    teacher_h, teacher_w, teacher_b = teacher
    return linear_head_distillation(h, w, teacher_h, teacher_w, linear_bias=b, teacher_bias=teacher_b, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_option_together(kind, dtype, impl, device, monkeypatch):
    monkeypatch.setattr("litropy.kernels.linear_head_fused._MAX_HALF_ROUNDINGS", 1)  # bfloat16 sums in float32
    leaves, teacher = problem(dtype, device)
    mask = torch.rand(N, device=device) < 0.8
    temperature, token_weight = 0.5 + torch.rand(N, device=device), torch.rand(N, device=device)
    options = {"softcap": 4.0, "teacher_softcap": 6.0, "temperature": temperature, "beta": 0.3, "mask": mask}
    loss = ours(
        leaves, teacher, kind=kind, impl=impl, token_weight=token_weight, num_items=torch.tensor(9.0), **options,
        memory_budget_mib=0.01,  # several blocks
    )  # fmt: skip
    got = torch.autograd.grad(loss, leaves)
    results = []
    for other in (dtype, torch.float64):
        others, rows = eager(leaves, teacher, other, kind, 0.3, (4.0, 6.0), temperature)
        expected = (rows * token_weight * mask).sum() / 9
        results.append((expected, *torch.autograd.grad(expected, others)))
    for name, a, b, c in zip(("loss", *NAMES), (loss, *got), *results, strict=True):
        assert_within_budget(name, a, b, c)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_tokens_loss_with_any_cotangent(kind, impl, device):
    leaves, teacher = problem(device=device)
    mask = torch.arange(N, device=device) % 5 != 0
    losses = ours(leaves, teacher, kind=kind, reduction="none", impl=impl, mask=mask)
    cotangent = torch.randn(N, device=device)
    got = torch.autograd.grad(losses, leaves, cotangent, retain_graph=True)
    results = []
    for dtype in (torch.float32, torch.float64):
        others, rows = eager(leaves, teacher, dtype, kind)
        rows = rows * mask
        results.append((rows, *torch.autograd.grad(rows, others, cotangent.to(dtype))))
    for name, a, b, c in zip(("losses", *NAMES), (losses, *got), *results, strict=True):
        assert_within_budget(name, a, b, c)
    assert (losses[~mask] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_by_finite_differences(kind, reduction):
    leaves, teacher = problem(torch.float64)
    leaves = [
        x.detach()[:9, :4].clone().requires_grad_() if x.ndim == 2 else x.detach()[:9].clone().requires_grad_()
        for x in leaves
    ]
    teacher = [teacher[0][:9], teacher[1][:9], teacher[2][:9]]
    low_rank = [torch.randn(9, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def loss(h, w, b, u, B):
        return ours((h, w, b), teacher, kind=kind, reduction=reduction, softcap=3.0, low_rank=(u, B))

    assert torch.autograd.gradcheck(loss, [*leaves, *low_rank])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits(kind, impl, device):
    """Logits of 1e4: most probabilities are exactly 0, and divergences of thousands of nats."""
    leaves, teacher = problem(device=device, scale=60.0)
    loss = ours(leaves, teacher, kind=kind, impl=impl)
    got = torch.autograd.grad(loss, leaves)
    results = []
    for dtype in (torch.float32, torch.float64):
        others, rows = eager(leaves, teacher, dtype, "forward_kl" if kind == "jsd" else kind)
        if kind == "jsd":  # through log m that does not underflow
            (h, w, b), (th, tw, tb) = others, (x.to(dtype) for x in teacher)
            q, p = F.linear(h, w, b).log_softmax(-1), F.linear(th, tw, tb).log_softmax(-1)
            m = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=dtype))
            rows = (0.5 * p.exp() * (p - m) + 0.5 * q.exp() * (q - m)).sum(-1)
        results.append((rows.mean(), *torch.autograd.grad(rows.mean(), others)))
    assert results[1][0] > (0.1 if kind == "jsd" else 1000)
    for name, a, b, c in zip(("loss", *NAMES), (loss, *got), *results, strict=True):
        assert_within_budget(name, a, b, c)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_nan_reaches_loss_and_gradient(whose, kind, impl, device):
    leaves, teacher = problem(device=device)
    with torch.no_grad():
        (leaves if whose == "student" else teacher)[0][3, 1] = torch.nan
    losses = ours(leaves, teacher, kind=kind, impl=impl, reduction="none")
    assert losses.isnan().nonzero().tolist() == [[3]]
    (d_input,) = torch.autograd.grad(losses.sum(), leaves[:1])
    assert d_input.isnan().any(-1).nonzero().tolist() == [[3]]
    # where the row is ignored it does no harm
    mask = torch.arange(N, device=device) != 3
    loss = ours(leaves, teacher, kind=kind, impl=impl, mask=mask)
    assert all(torch.isfinite(x).all() for x in (loss, *torch.autograd.grad(loss, leaves)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_entries_without_probability(kind, impl, device):
    """A bias of minus infinity takes an entry out of both distributions."""
    leaves, teacher = problem(device=device)
    gone = torch.arange(V, device=device) % 7 == 0
    leaves[2] = leaves[2].detach().masked_fill(gone, -torch.inf).requires_grad_()
    teacher[2] = teacher[2].masked_fill(gone, -torch.inf)
    loss = ours(leaves, teacher, kind=kind, impl=impl)
    d_input, d_weight = torch.autograd.grad(loss, leaves[:2])
    kept = [x.detach()[~gone].requires_grad_() for x in leaves[1:]]
    h = leaves[0].detach().requires_grad_()
    expected = ours([h, *kept], [teacher[0], *(x[~gone] for x in teacher[1:])], kind=kind, impl=impl)
    torch.testing.assert_close(loss, expected)
    for a, b in zip((d_input, d_weight[~gone]), torch.autograd.grad(expected, [h, kept[0]]), strict=True):
        torch.testing.assert_close(a, b)
    assert (d_weight[gone] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_learn_from(reduction, impl, device):
    leaves, teacher = problem(device=device)
    for rows, mask in ((0, None), (N, torch.zeros(N, dtype=torch.bool, device=device))):
        loss = ours(
            [leaves[0][:rows], *leaves[1:]],
            [teacher[0][:rows], *teacher[1:]],
            reduction=reduction,
            mask=mask,
            impl=impl,
        )
        assert loss.sum() == 0
        assert all((x == 0).all() for x in torch.autograd.grad(loss.sum(), leaves))


def test_equal_models_are_no_distance_apart_and_the_mixture_lies_between():
    leaves, _ = problem(torch.float64)
    same = [x.detach() for x in leaves]
    for kind in KINDS:
        loss = ours(leaves, same, kind=kind)
        assert abs(loss) < 1e-14
        assert all(x.abs().max() < 1e-14 for x in torch.autograd.grad(loss, leaves))
    leaves, teacher = problem(torch.float64, scale=0.3)
    forward, reverse = (ours(leaves, teacher, kind=kind) for kind in KINDS[:2])
    torch.testing.assert_close(ours(leaves, teacher, kind="jsd", beta=1e-6) / 1e-6, forward, rtol=1e-4, atol=0)
    torch.testing.assert_close(ours(leaves, teacher, kind="jsd", beta=1 - 1e-6) / 1e-6, reverse, rtol=1e-4, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_small_gradients_in_half_precision_meet_the_loss_scaler_first(impl, device):
    leaves, teacher = problem(torch.float16, device)
    loss = ours(leaves, teacher, token_weight=torch.full((N,), 1e-6, device=device), impl=impl)
    got = torch.autograd.grad(2.0**20 * loss, leaves)
    results = []
    for dtype in (torch.float16, torch.float64):
        others, rows = eager(leaves, teacher, dtype, "forward_kl")
        results.append(torch.autograd.grad(2.0**20 * 1e-6 * rows.mean(), others))
    for name, a, b, c in zip(NAMES, got, *results, strict=True):
        assert_within_budget(name, a, b, c)


def test_frozen_parts_shapes_and_a_second_backward_pass():
    leaves, teacher = problem()
    h = leaves[0].detach().view(1, N, D).requires_grad_()
    w = leaves[1].detach()
    loss = linear_head_distillation(h, w, teacher[0][None], teacher[1].double(), kind="reverse_kl")
    first = torch.autograd.grad(loss, h, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(3 * loss, h)[0], 3 * first)
    assert first.shape == (1, N, D)
    with torch.no_grad():
        torch.testing.assert_close(
            linear_head_distillation(h, w, teacher[0][None], teacher[1], kind="reverse_kl"), loss.detach()
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_without_graph_breaks(reduction):
    leaves, teacher = problem()

    def run(*leaves):
        return ours(leaves, teacher, kind="jsd", reduction=reduction).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*leaves), run(*leaves)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl, device):
    leaves, teacher = problem(device=device)
    student, other = prepare(leaves[0], leaves[1], None, bias=leaves[2]), prepare(*teacher[:2], None)
    mask, weights = torch.ones(N, dtype=torch.bool, device=device), torch.rand(N, device=device)
    # gradients that are outputs are scaled in place by the backward pass, which compiled code does not see as such
    fused = ("test_schema", "test_autograd_registration", "test_faketensor")
    for need, tests in (([True, True, True, False], fused), ([False] * 4, (*fused, "test_aot_dispatch_dynamic"))):
        arguments = (leaves[0], *student.head, other.input, *other.head, mask, weights, "jsd", 0.5, need, torch.float32)
        plan = (impl, torch.float32, 1 << 20, 0.0)
        torch.library.opcheck(torch.ops.litropy.linear_head_divergence, (*arguments, *plan), test_utils=tests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "kl"}, "`kind` is 'kl'"),
        ({"beta": 1.0}, "`beta` is 1.0; it must be in"),
        ({"reduction": "max"}, "`reduction` is 'max'"),
        ({"reduction": "sum", "num_items": 3}, "`num_items` replaces"),
        ({"teacher_weight": torch.randn(V + 1, TEACHER_D), "teacher_bias": None}, "75 entries and `teacher_weight` 76"),
        ({"teacher_input": torch.randn(N + 1, TEACHER_D)}, "must be the same ones"),
        ({"mask": torch.ones(N)}, "must be bool of shape"),
        ({"memory_budget_mib": 1e-4}, "Not a single row of 75 logits of both models fits"),
        ({"memory_budget_mib": 0}, "it must be positive"),
        ({"teacher_temperature": 0.0}, "`temperature` is 0.0"),
    ],
)
def test_wrong_options(change, message):
    leaves, teacher = problem()
    options = dict(zip(("input", "linear_weight", "linear_bias"), leaves, strict=True))
    options |= dict(zip(("teacher_input", "teacher_weight", "teacher_bias"), teacher, strict=True)) | change
    with pytest.raises(ValueError, match=message):
        linear_head_distillation(**options)


@pytest.mark.parametrize("tail", ["merge", "drop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_known_entries_of_a_teacher(dtype, tail, device):
    leaves, teacher = problem(dtype, device)
    p, ids = F.linear(*teacher).float().softmax(-1).topk(5)
    mask = torch.arange(N, device=device) % 4 != 0
    options = {"tail": tail, "linear_bias": leaves[2], "mask": mask, "reduction": "none"}
    losses = linear_head_topk_distillation(*leaves[:2], ids, p, **options)
    results = []
    for other in (dtype, torch.float64):
        others = [x.detach().to(other).requires_grad_() for x in leaves]
        z = F.linear(*others)
        q = (z if other == torch.float64 else z.float()).softmax(-1).gather(-1, ids)
        known = p.to(q.dtype)
        rows = (known * (known / q).log()).sum(-1)
        if tail == "merge":
            rest, student = 1 - known.sum(-1), 1 - q.sum(-1)
            rows = rows + rest * (rest / student).log()
        rows = rows * mask
        results.append((rows, *torch.autograd.grad(rows.sum(), others)))
    got = (losses, *torch.autograd.grad(losses.sum(), leaves))
    for name, a, b, c in zip(("losses", *NAMES), got, *results, strict=True):
        assert_within_budget(name, a, b, c)
    mean = linear_head_topk_distillation(*leaves[:2], ids, p, **options | {"reduction": "mean"})
    torch.testing.assert_close(mean, losses.sum() / mask.sum())


def test_all_entries_known_is_the_whole_divergence():
    leaves, teacher = problem(torch.float64)
    p, ids = F.linear(*teacher).softmax(-1), torch.arange(V).expand(N, V)
    whole = ours(leaves, teacher)
    for tail in ("merge", "drop"):
        loss = linear_head_topk_distillation(*leaves[:2], ids, p, tail=tail, linear_bias=leaves[2])
        torch.testing.assert_close(loss, whole, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="shaped like `ids`"):
        linear_head_topk_distillation(*leaves[:2], ids, p[:, :3])
    with pytest.raises(ValueError, match="`tail` is 'keep'"):
        linear_head_topk_distillation(*leaves[:2], ids, p, tail="keep")


MEMORY = """
import os, sys, torch
torch.set_num_threads(1)
from litropy.losses import linear_head_distillation

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

def step(N, D, V):
    h, w = torch.randn(N, D, dtype=dtype, requires_grad=True), torch.randn(V, D, dtype=dtype, requires_grad=True)
    th, tw = torch.randn(N, D + 32, dtype=dtype), torch.randn(V, D + 32, dtype=dtype)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    linear_head_distillation(h, w, th, tw, kind="jsd").backward()
    return status("VmHWM") - before - (h.grad.nbytes + w.grad.nbytes) / 2**20

for name in sys.argv[1:]:
    if os.fork() == 0:  # a process for each, in which nothing has been freed that could be used again
        dtype = getattr(torch, name)
        step(64, 64, 512)
        print(step(640, 64, 32768), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_beyond_the_gradients():
    """At most 64 MiB where the two models' logits would take 160, or half of that, and their gradient more."""
    command = [sys.executable, "-c", MEMORY, "float32", "bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks = [float(line) for line in done.stdout.split()]
    assert len(peaks) == 2
    assert all(4 < peak <= 64 for peak in peaks), peaks
