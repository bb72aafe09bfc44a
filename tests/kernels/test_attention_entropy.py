"""Attention entropy against stored float64 logits: values, gradients, implementations, every option, odd shapes."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litropy.kernels import attention_entropy_torch, attention_entropy_triton
from litropy.kernels.attention_entropy import AttentionStats, attention_entropy
from litropy.kernels.attention_entropy_reference import attention_entropy_reference, visible
from litropy.testing import assert_within_budget

pytestmark = pytest.mark.usefixtures("poisoned_empty")

FIELDS = [field.name for field in dataclasses.fields(AttentionStats)]
DIFFERENTIABLE = ("entropy", "normalized_entropy", "lse")
IMPLS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(shape, dtype=torch.float32, device="cpu", scale=1.0):
    B, H, heads, Tq, Tk, D = shape
    q = (scale * torch.randn(B, H, Tq, D, device=device)).to(dtype)
    return q, torch.randn(B, heads, Tk, D, device=device).to(dtype)


# each makes its argument for B, H, Tq, Tk; together they are all there are
OPTIONS = {
    "scale": lambda B, H, Tq, Tk: 0.7,
    "causal": lambda B, H, Tq, Tk: True,
    "window": lambda B, H, Tq, Tk: 1 + Tk // 3,
    "prefix_length": lambda B, H, Tq, Tk: torch.randint(Tk + 1, (B,)),
    "segment_ids": lambda B, H, Tq, Tk: torch.arange(Tq).expand(B, Tq) // 5,
    "key_segment_ids": lambda B, H, Tq, Tk: torch.randint(1 + Tq // 5, (B, Tk)).sort(1).values,
    "key_mask": lambda B, H, Tq, Tk: torch.rand(B, Tk) < 0.8,
    "mask": lambda B, H, Tq, Tk: torch.rand(1, H, Tq, Tk) < 0.8,
    "bias": lambda B, H, Tq, Tk: torch.randn(B, 1, Tq, Tk).masked_fill(torch.rand(Tk) < 0.1, -math.inf),
    "alibi_slopes": lambda B, H, Tq, Tk: 2.0 ** -torch.arange(1, H + 1),
    "softcap": lambda B, H, Tq, Tk: 1.5,
    "sinks": lambda B, H, Tq, Tk: torch.randn(H),
    "rows": lambda B, H, Tq, Tk: torch.randint(Tq, (B, 7)),
}


def make_options(names, shape, device="cpu"):
    B, H, _, Tq, Tk, _ = shape
    made = {name: OPTIONS[name](B, H, Tq, Tk) for name in names}
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in made.items()}


def run(function, q, k, options, cotangents):
    leaves = [q.detach().requires_grad_(), k.detach().requires_grad_()]
    if "sinks" in options:
        leaves.append(options["sinks"].detach().to(q.dtype).requires_grad_())
        options = options | {"sinks": leaves[2]}
    stats = function(*leaves[:2], **options)
    total = sum((getattr(stats, name) * g.to(stats.lse.dtype)).sum() for name, g in cotangents.items())
    return stats, torch.autograd.grad(total, leaves)


def check(q, k, impl, options):
    R = options["rows"].shape[-1] if "rows" in options else q.shape[2]
    cotangents = {name: torch.randn(*q.shape[:2], R, device=q.device) for name in DIFFERENTIABLE}
    ours, gradients = run(attention_entropy, q, k, options | {"impl": impl}, cotangents)
    twin, twin_gradients = run(attention_entropy_reference, q, k, options, cotangents)
    truth, true_gradients = run(attention_entropy_reference, q.double(), k.double(), options, cotangents)
    assert torch.equal(ours.visible_keys.double(), truth.visible_keys)
    for name in FIELDS:
        assert getattr(ours, name).dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
        assert_within_budget(name, getattr(ours, name), getattr(twin, name), getattr(truth, name))
    for name, got, eager, exact in zip(("dq", "dk", "ds"), gradients, twin_gradients, true_gradients, strict=False):
        assert got.dtype == eager.dtype
        assert_within_budget(name, got, eager, exact)
    return ours


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, 1),  # the smallest there is
        (2, 3, 1, 5, 7, 3),  # smaller than any tile; all heads share one key head
        (1, 4, 2, 67, 131, 33),  # divisible by nothing, several tiles each way, two heads a key head
        (1, 2, 2, 65, 33, 80),  # one more than a tile; more queries than keys
    ],
)
def test_statistics_and_gradients(shape, dtype, impl, device):
    check(*problem(shape, dtype, device), impl, {})
    check(*problem(shape, dtype, device), impl, {"causal": True})


NOT_ALONE = ("causal", "prefix_length", "segment_ids", "key_segment_ids")  # tested above, or need another


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in NOT_ALONE])
def test_each_option(name, impl, device):
    """In float32 alone: an option changes logits, which are float32 whatever they come from."""
    shape = (2, 2, 1, 40, 70, 16)
    check(*problem(shape, torch.float32, device, scale=2.0), impl, make_options((name,), shape, device))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "names",
    [
        ("causal", "window"),
        ("causal", "prefix_length"),
        ("causal", "window", "prefix_length"),
        ("segment_ids", "key_segment_ids"),
        ("softcap", "bias"),
        ("causal", "sinks", "softcap", "alibi_slopes", "rows"),
        ("causal", "window", "bias", "mask", "key_mask", "rows", "sinks"),
        tuple(OPTIONS),
    ],
    ids="+".join,
)
def test_options_together(names, dtype, impl, device):
    shape = (2, 4, 2, 40, 77, 16) if len(names) > 4 else (2, 2, 1, 40, 70, 16)
    check(*problem(shape, dtype, device, scale=2.0), impl, make_options(names, shape, device))


def any_case(draw):
    heads = draw(st.integers(1, 3))
    Tq = draw(st.integers(1, 70))
    shape = (draw(st.integers(1, 3)), heads * draw(st.integers(1, 3)), heads, Tq, draw(st.integers(1, 100)))
    names = set(draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=6)))
    if "prefix_length" in names:
        names.add("causal")
    if names & {"segment_ids", "key_segment_ids"}:
        names |= {"segment_ids", "key_segment_ids"}
    return (*shape, draw(st.integers(4, 24))), sorted(names), draw(st.integers(0, 1000))


# the eager twin's worst error is a fair yardstick only over enough numbers: no tiny widths in float32
@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    case=st.composite(any_case)(),
    dtype=st.sampled_from((*DTYPES, torch.float64)),
    scale=st.sampled_from((0.01, 1.0, 10.0)),
    tile=st.sampled_from((1, 1 << 10, 1 << 17)),
)
def test_any_combination(case, dtype, scale, tile):
    """Whatever the options and the tiles are, the result stays within the budget."""
    shape, names, seed = case
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_entropy_torch, "_TILE", tile)
        check(*problem(shape, dtype, scale=scale), "torch", make_options(names, shape))


@settings(deadline=None, max_examples=6, derandomize=True)
@given(case=st.composite(any_case)(), dtype=st.sampled_from(DTYPES))
def test_any_combination_in_triton(case, dtype):
    shape, names, seed = case
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(*problem(shape, dtype, device), "triton", make_options(names, shape, device))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_strip_of_keys_at_a_time(impl, device, monkeypatch):
    """The gradients do not depend on how much workspace there is."""
    monkeypatch.setattr(attention_entropy_torch, "_TILE", 1)
    monkeypatch.setattr(attention_entropy_triton, "_STRIP", 1)
    shape = (1, 2, 1, 70, 90, 16)
    check(*problem(shape, torch.float32, device), impl, make_options(("causal", "key_mask"), shape, device))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_extreme_logits(impl, scale, device):
    """Nearly one-hot rows and logits in the hundreds and thousands: finite, and within the budget."""
    shape = (1, 2, 1, 40, 90, 16)
    stats = check(*problem(shape, torch.float32, device, scale), impl, {"causal": True})
    assert (stats.entropy >= 0).all()
    assert (stats.max_logit.abs() > scale).any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offset", [1e3, -1e3])
def test_large_offsets_keep_their_digits(offset, impl, device):
    """A bias that all keys share changes no probability; raw sums of z exp z lose digits."""
    q, k = problem((1, 2, 2, 30, 200, 16), device=device)
    q.requires_grad_()
    plain = attention_entropy(q, k, impl=impl)
    shifted = attention_entropy(q, k, bias=torch.full((1, 1, 1, 200), offset, device=device), impl=impl)
    slack = 4 * torch.finfo(torch.float32).eps * abs(offset)
    for name in ("entropy", "normalized_entropy", "p_max", "p_first", "entropy_without_sinks"):
        torch.testing.assert_close(getattr(shifted, name), getattr(plain, name), rtol=0, atol=slack)
    torch.testing.assert_close(shifted.lse, plain.lse + offset, rtol=0, atol=slack)
    (got,) = torch.autograd.grad(shifted.entropy.sum(), q)
    (expected,) = torch.autograd.grad(plain.entropy.sum(), q)
    torch.testing.assert_close(got, expected, rtol=0, atol=slack)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sink", [-math.inf, -300.0, 300.0])
def test_sinks_of_any_size(sink, impl, device):
    """A sink logit takes its mass and counts as an outcome; without mass, or with all of it, everything is finite."""
    q, k = problem((1, 2, 1, 9, 40, 8), device=device)
    sinks = torch.full((2,), sink, device=device, requires_grad=True)
    q.requires_grad_()
    stats, plain = attention_entropy(q, k, sinks=sinks, impl=impl), attention_entropy(q, k, impl=impl)
    gradients = torch.autograd.grad((stats.entropy + stats.lse).sum(), [q, sinks])
    assert all(g.isfinite().all() for g in gradients)
    torch.testing.assert_close(stats.entropy_without_sinks, plain.entropy_without_sinks)
    if sink > 0:
        torch.testing.assert_close(stats.p_sink, torch.ones_like(stats.p_sink))
        torch.testing.assert_close(stats.entropy, torch.zeros_like(stats.entropy))
        torch.testing.assert_close(gradients[1], torch.full_like(gradients[1], 9.0))
    else:
        torch.testing.assert_close(stats.entropy, plain.entropy)
        torch.testing.assert_close(stats.normalized_entropy, plain.entropy / math.log(41))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_rows_that_see_no_key_are_left_out(with_sinks, impl, device):
    """0 in every field, no gradient, no NaN; a row that sees one key is uniform."""
    q, k = problem((2, 2, 1, 6, 4, 8), device=device)  # causal, two queries more than keys
    leaves = [q.requires_grad_(), k.requires_grad_()]
    if with_sinks:
        leaves.append(torch.zeros(2, device=device, requires_grad=True))
    stats = attention_entropy(q, k, causal=True, sinks=leaves[2] if with_sinks else None, impl=impl)
    for name in FIELDS:
        assert torch.equal(getattr(stats, name)[:, :, :2], torch.zeros(2, 2, 2, device=device)), name
    one = stats.entropy[:, :, 2]
    if not with_sinks:
        assert torch.equal(one, torch.zeros_like(one))
        assert torch.equal(stats.normalized_entropy[:, :, 2], torch.ones_like(one))
    assert (stats.visible_keys[0, 0] == torch.tensor([0.0, 0, 1, 2, 3, 4], device=device)).all()
    for gradient in torch.autograd.grad((stats.normalized_entropy + stats.lse)[:, :, :2].sum(), leaves):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    hidden = torch.zeros(2, 4, dtype=torch.bool, device=device)
    assert not any(getattr(attention_entropy(q, k, key_mask=hidden, impl=impl), name).any() for name in FIELDS)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("tensor", "bad"),
    # an infinite key makes logits of both signs, and one of -inf is no fault
    [("q", math.nan), ("q", math.inf), ("k", math.nan), ("bias", math.nan), ("bias", math.inf)],
)
def test_nan_is_reported_in_exactly_the_rows_it_touches(tensor, bad, impl, device):
    q, k = problem((2, 4, 2, 9, 70, 8), device=device)
    tensors = {"q": q, "k": k, "bias": torch.zeros(2, 1, 9, 70, device=device)}
    touched = torch.zeros(2, 4, 9, dtype=torch.bool, device=device)
    tensors[tensor][1, -1, 5, 3] = bad  # head, row or key, column
    if tensor == "q":
        touched[1, 3, 5] = True
    elif tensor == "k":  # two query heads see it, in all rows but those whose mask hides it
        touched[1, 2:] = True
        touched[1, :, :4] = False
    else:
        touched[1, :, 5] = True
    mask = torch.ones(1, 1, 9, 70, dtype=torch.bool, device=device)
    mask[:, :, :4, 5] = False
    q.requires_grad_()
    stats = attention_entropy(q, k, mask=mask, bias=tensors["bias"], impl=impl)
    for name in FIELDS:
        assert torch.equal(getattr(stats, name).isnan(), touched & (name != "visible_keys")), name
    (dq,) = torch.autograd.grad((stats.entropy + stats.lse).sum(), q)
    assert torch.equal(dq.isnan().any(-1), touched)


@pytest.mark.parametrize("impl", IMPLS)
def test_garbage_behind_a_mask_leaves_no_trace(impl, device):
    """Padding may hold anything, NaN included, and neither statistics nor gradients notice."""
    shape = (2, 4, 2, 12, 70, 8)
    q, k = problem(shape, device=device)
    key_mask = torch.arange(70, device=device).expand(2, -1) < torch.tensor([[50], [70]], device=device)
    rows = torch.tensor([1, 4, 9], device=device)
    results = []
    for garbage in (0.0, math.nan, math.inf):
        q[:, :, 5], k[0, :, 50:] = garbage, garbage
        leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
        stats = attention_entropy(*leaves, key_mask=key_mask, rows=rows, impl=impl)
        gradients = torch.autograd.grad((stats.entropy + stats.lse).sum(), leaves)
        results.append([*(getattr(stats, name) for name in FIELDS), *gradients])
    for clean, *dirty in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert all(torch.equal(clean, x) for x in dirty)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_bias_of_the_least_number_hides_like_a_mask(dtype, impl, device):
    q, k = problem((2, 2, 2, 20, 30, 8), device=device)
    mask = torch.rand(2, 1, 20, 30, device=device) < 0.5
    mask[:, :, 3] = False
    expected = attention_entropy(q, k, mask=mask, impl=impl)
    for least in (-math.inf, torch.finfo(dtype).min):
        bias = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, least)
        stats = attention_entropy(q, k, bias=bias, impl=impl)
        for name in FIELDS:
            assert torch.equal(getattr(stats, name), getattr(expected, name)), name


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_documents_are_as_good_as_apart(impl, device):
    q, k = problem((1, 2, 2, 90, 90, 8), device=device)
    lengths = (20, 1, 69)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].to(device)
    slopes = torch.tensor([0.5, 0.1], device=device)
    options = {"causal": True, "window": 30, "alibi_slopes": slopes, "impl": impl}
    packed = attention_entropy(q, k, segment_ids=segments, **options)
    by_position = attention_entropy(q, k, position_ids=positions, **options)
    parts = [attention_entropy(a, b, **options) for a, b in zip(q.split(lengths, 2), k.split(lengths, 2), strict=True)]
    for name in FIELDS:
        apart = torch.cat([getattr(part, name) for part in parts], 2)
        torch.testing.assert_close(getattr(packed, name), apart)
        assert torch.equal(getattr(packed, name), getattr(by_position, name))


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_are_a_selection(impl, device):
    """In any order, repeated or not, for the batch or for each of its entries; repeated rows add their gradients."""
    q, k = problem((2, 2, 1, 40, 40, 8), device=device)
    leaves = [q.requires_grad_(), k.requires_grad_()]
    all_rows = attention_entropy(q, k, causal=True, impl=impl)
    shared = torch.tensor([39, 3, 3, 0, 17, 3], device=device)
    apart = torch.stack([shared, shared.flip(0)])
    weights = torch.rand(2, 2, 6, device=device)
    for rows, expanded in ((shared, shared.expand(2, 6)), (apart, apart)):
        index = expanded[:, None].expand(2, 2, 6)
        stats = attention_entropy(q, k, causal=True, rows=rows, impl=impl)
        for name in FIELDS:
            torch.testing.assert_close(getattr(stats, name), getattr(all_rows, name).gather(2, index))
        got = torch.autograd.grad((stats.entropy * weights).sum(), leaves)
        expected = torch.autograd.grad((all_rows.entropy.gather(2, index) * weights).sum(), leaves, retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_non_contiguous_inputs(impl, device):
    """Views as attention modules make them, and stranger ones, are read in place."""
    shape = (2, 4, 2, 30, 50, 12)
    q, k = problem(shape, device=device)
    options = make_options(("bias", "mask", "key_mask", "segment_ids", "key_segment_ids", "rows"), shape, device)
    expected = check(q, k, impl, options)
    layouts = (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda x: torch.stack([x, torch.full_like(x, 1)], -1)[..., 0],
    )
    for layout in layouts:
        strided = {name: layout(x) if x.ndim == 4 else layout(x[None])[0] for name, x in options.items()}
        assert not any(x.is_contiguous() for name, x in strided.items() if name == "rows")
        stats = check(layout(q), layout(k), impl, strided)
        for name in FIELDS:
            torch.testing.assert_close(getattr(stats, name), getattr(expected, name))


def test_positions_are_aligned_at_the_last_key():
    q, k = problem((1, 1, 1, 3, 5, 4))
    seen = torch.ones(3, 5).tril(2).bool()
    assert torch.equal(visible(q, k, causal=True)[0, 0], seen)
    assert torch.equal(visible(q, k, causal=True, window=2)[0, 0], seen & ~torch.ones(3, 5).tril(0).bool())
    assert attention_entropy(q, k, causal=True).visible_keys.flatten().tolist() == [3, 4, 5]
    assert attention_entropy(q, k, window=2).visible_keys.flatten().tolist() == [3, 3, 2]
    assert attention_entropy(q, k, causal=True, prefix_length=4).visible_keys.flatten().tolist() == [4, 4, 5]


@pytest.mark.parametrize("impl", IMPLS)
def test_known_values(impl, device):
    """Uniform rows have ln n; the largest raw logit is that before softcap and biases; a first key can be taken out."""
    q, k = torch.zeros(1, 1, 1, 4, device=device), torch.zeros(1, 1, 8, 4, device=device)
    uniform = attention_entropy(q, k, impl=impl)
    assert uniform.entropy.item() == pytest.approx(math.log(8))
    assert uniform.normalized_entropy.item() == pytest.approx(1)
    assert uniform.entropy_without_sinks.item() == pytest.approx(math.log(7))
    sunk = attention_entropy(q, k, sinks=torch.tensor([math.log(8.0)], device=device), impl=impl)
    assert sunk.p_sink.item() == pytest.approx(0.5)
    assert sunk.entropy.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(16))
    assert sunk.normalized_entropy.item() == pytest.approx(sunk.entropy.item() / math.log(9))
    assert sunk.visible_keys.item() == 8
    q, k = torch.ones_like(q), k.clone()
    k[0, 0, 0] = 100.0
    bias = torch.zeros(1, 1, 1, 8, device=device)
    bias[..., 0] = -3.0
    stats = attention_entropy(q, k, scale=1.0, softcap=20.0, bias=bias, impl=impl)
    assert stats.max_raw_logit.item() == 400
    assert stats.max_logit.item() == pytest.approx(17)
    assert stats.p_first.item() == pytest.approx(stats.p_max.item())
    assert stats.entropy_without_sinks.item() == pytest.approx(math.log(7))


@pytest.mark.parametrize("name", ["none", "q", "k", "heads", "batch"])
def test_nothing_to_do(name, device):
    """No rows, no keys, no queries, no heads or no batch: empty or zero, connected to the graph."""
    shape = {"none": (2, 2, 1, 5, 6, 4), "q": (2, 2, 1, 0, 6, 4), "k": (2, 2, 1, 5, 0, 4), "heads": (2, 0, 1, 5, 6, 4)}
    q, k = problem(shape.get(name, (0, 2, 1, 5, 6, 4)), device=device)
    leaves = [q.requires_grad_(), k.requires_grad_()]
    rows = torch.zeros(0, dtype=torch.int64, device=device) if name == "none" else None
    for impl in IMPLS:
        stats = attention_entropy(q, k, rows=rows, causal=True, impl=impl)
        assert stats.entropy.shape == (*q.shape[:2], 0 if name == "none" else q.shape[2])
        assert not any(getattr(stats, field).any() for field in FIELDS)
        for leaf, gradient in zip(leaves, torch.autograd.grad(stats.entropy.sum(), leaves), strict=True):
            assert torch.equal(gradient, torch.zeros_like(leaf))


def test_finite_differences():
    shape = (2, 4, 2, 5, 7, 3)
    q, k = problem(shape, torch.float64)
    sinks = torch.randn(4, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, sinks)]
    options = make_options(("softcap", "bias", "alibi_slopes", "mask", "causal"), shape)
    rows = torch.tensor([4, 1, 4])

    def statistics(q, k, sinks):
        stats = attention_entropy(q, k, sinks=sinks, rows=rows, **options)
        return stats.entropy, stats.normalized_entropy, stats.lse

    assert torch.autograd.gradcheck(statistics, leaves)
    stats = attention_entropy(*leaves[:2], rows=rows)
    assert [name for name in FIELDS if getattr(stats, name).requires_grad] == ["entropy", "normalized_entropy", "lse"]


@pytest.mark.parametrize("rows", [None, 16])
def test_no_matrix_of_attention(rows):
    """No allocation has room for rows by keys, forwards or backwards; masks and biases are read in place."""
    H, T, D = 2, 1500, 8
    leaves = [x.requires_grad_() for x in problem((1, H, 1, T, T, D))]
    masks = {"bias": torch.zeros(1, 1, T, T), "mask": torch.ones(1, 1, T, T, dtype=torch.bool)}
    if rows is not None:
        rows = torch.randperm(T)[:rows]
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        stats = attention_entropy(*leaves, causal=True, softcap=9.0, rows=rows, **masks)
        torch.autograd.grad(stats.entropy.sum(), leaves)
    largest = max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    tile, leaf = 4 * attention_entropy_torch._TILE, 4 * H * T * D
    assert leaf <= largest <= max(tile, leaf) < 4 * H * T * T / 32


@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_twice(impl, device):
    shape = (2, 4, 2, 70, 90, 16)
    q, k = problem(shape, device=device)
    options = make_options(("causal", "rows", "sinks"), shape, device) | {"impl": impl}
    options["rows"] = torch.zeros_like(options["rows"])
    cotangents = {name: torch.randn(2, 4, 7, device=device) for name in DIFFERENTIABLE}
    (first, first_gradients), (second, second_gradients) = (
        run(attention_entropy, q, k, options, cotangents) for _ in range(2)
    )
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in FIELDS)
    assert all(torch.equal(a, b) for a, b in zip(first_gradients, second_gradients, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole(impl, device):
    shape = (2, 4, 2, 12, 20, 8)
    q, k = problem(shape, device=device)
    names = ("causal", "window", "prefix_length", "bias", "mask", "softcap", "sinks", "rows", "alibi_slopes")
    options = make_options(names, shape, device) | {"impl": impl}
    cotangents = {name: torch.randn(2, 4, 7, device=device) for name in DIFFERENTIABLE}
    compiled = torch.compile(attention_entropy, fullgraph=True, backend="aot_eager")
    stats, gradients = run(compiled, q, k, options, cotangents)
    expected, expected_gradients = run(attention_entropy, q, k, options, cotangents)
    for name in FIELDS:
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name))
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_whole_with_position_ids():
    q, k = problem((2, 2, 1, 12, 12, 8))
    positions = torch.arange(12)[None] % 5
    compiled = torch.compile(attention_entropy, fullgraph=True, backend="aot_eager")
    got, expected = (f(q, k, causal=True, position_ids=positions) for f in (compiled, attention_entropy))
    torch.testing.assert_close(got.entropy, expected.entropy)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl, device):
    shape = (2, 4, 2, 6, 9, 5)
    q, k = problem(shape, device=device)
    made = make_options(("sinks", "key_mask", "mask", "bias", "alibi_slopes"), shape, device)
    leaves = [x.requires_grad_() for x in (q, k, made["sinks"])]
    rows = torch.tensor([[0, 3, 3]], device=device)
    arguments = (leaves[0], rows, *leaves[1:], None, None, *list(made.values())[1:], None, 0.5, 2.0, 3, True, impl)
    torch.library.opcheck(torch.ops.litropy.attention_entropy, arguments)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_rounds_nothing(impl, device):
    q, k = problem((1, 2, 1, 20, 30, 16), device=device, scale=3.0)
    cotangents = {name: torch.randn(1, 2, 20, device=device) for name in DIFFERENTIABLE}
    expected, expected_gradients = run(attention_entropy, q, k, {"impl": impl}, cotangents)
    with torch.autocast(device.type, torch.bfloat16):
        got, gradients = run(attention_entropy, q, k, {"impl": impl}, cotangents)
    assert all(torch.equal(getattr(got, name), getattr(expected, name)) for name in FIELDS)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients, strict=True))


def test_only_one_of_the_gradients():
    q, k = problem((1, 2, 1, 5, 6, 4))
    for leaf in (q, k):
        leaf.requires_grad_()
        stats = attention_entropy(q, k)
        (got,) = torch.autograd.grad(stats.lse.sum(), leaf)
        truth = attention_entropy_reference(q, k)
        torch.testing.assert_close(got, torch.autograd.grad(truth.lse.sum(), leaf)[0])
        leaf.requires_grad_(False)
    assert not attention_entropy(q, k).entropy.requires_grad


B, H, T = 2, 4, 6
WRONG = {
    "k": ({"k": torch.zeros(2, 3, T, 8)}, "multiple of Hkv"),
    "dtype": ({"k": torch.zeros(2, 2, T, 8).half()}, "the same"),
    "window": ({"window": 0}, "at least 1"),
    "softcap": ({"softcap": -1.0}, "positive"),
    "prefix": ({"prefix_length": 2}, "causal=True"),
    "prefix shape": ({"prefix_length": torch.zeros(3, dtype=torch.int64), "causal": True}, r"\[B\]"),
    "segments": ({"segment_ids": torch.zeros(B, T - 1, dtype=torch.int64)}, r"\(2, 6\)"),
    "key segments": ({"key_segment_ids": torch.zeros(B, T, dtype=torch.int64)}, "needs `segment_ids`"),
    "positions": ({"position_ids": torch.zeros(1, T).long(), "segment_ids": torch.zeros(1, T).long()}, "alone"),
    "key_mask": ({"key_mask": torch.ones(B, T)}, r"mask.bool\(\)"),
    "mask": ({"mask": torch.ones(3, 1, T, T, dtype=torch.bool)}, r"\(2, 4, 6, 6\)"),
    "bias": ({"bias": torch.zeros(1, 1, T, 1)}, "any axis but the last"),
    "bias dtype": ({"bias": torch.zeros(1, 1, T, T, dtype=torch.int64)}, "float"),
    "bias gradient": ({"bias": torch.zeros(1, 1, T, T, requires_grad=True)}, "detach"),
    "slopes": ({"alibi_slopes": torch.zeros(3)}, r"\[H\]"),
    "sinks": ({"sinks": torch.zeros(1, 4)}, r"\[H\]"),
    "rows": ({"rows": torch.zeros(3)}, "int64"),
    "rows batch": ({"rows": torch.zeros(3, 1, dtype=torch.int64)}, "B = 2"),
    "row": ({"rows": torch.tensor([0, 6])}, "0 to 5"),
    "negative row": ({"rows": torch.tensor([-1])}, "0 to 5"),
    "impl": ({"impl": "cuda"}, "'auto', 'triton' or 'torch'"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_errors_say_what_is_allowed(case):
    change, message = case
    arguments = {"q": torch.zeros(B, H, T, 8), "k": torch.zeros(B, 2, T, 8)} | change
    with pytest.raises(ValueError, match=message):
        attention_entropy(**arguments)


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k = problem((1, 1, 1, 2, 2, 4))
    with pytest.raises(ValueError, match="needs a GPU"):
        attention_entropy(q, k, impl="triton")
    with pytest.raises(ValueError, match="float64"):
        attention_entropy(q.double(), k.double(), impl="triton")
    with pytest.raises(ValueError, match="must be given with"):
        attention_entropy(q[:, :, :1], k, segment_ids=torch.zeros(1, 1, dtype=torch.int64))
