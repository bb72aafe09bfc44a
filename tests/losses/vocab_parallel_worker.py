"""Checks of heads whose vocabulary is cut over processes; test_vocab_parallel.py runs them and reports each by name.

torchrun --nproc-per-node 2 vocab_parallel_worker.py FOLDER

Every rank computes the whole problem alone and its part of it in the group, and compares the two.
"""

import json
import math
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import vocab_parallel_meshes  # noqa: F401 its checks register themselves
from vocab_parallel_problems import (
    CHECKS,
    DIFFERENTIABLE,
    RANKING,
    SIZES,
    STREAMED,
    D,
    V,
    assert_close,
    assert_same_gradients,
    call,
    cases,
    check,
    class_weights,
    compare_loss,
    counted_collectives,
    fresh,
    gradients,
    make_problem,
    part_of,
    per_token,
)

from litropy.losses import CutCrossEntropyLoss, linear_cross_entropy, linear_head_stats
from litropy.testing import assert_within_budget

# longer than any check takes; a rank that waits for others in vain gives up and says so
TIMEOUT = timedelta(seconds=60)
MOST_FAILURES = 5


@cases(
    2,
    4,
    plain={},
    sum={"reduction": "sum"},
    none={"reduction": "none"},
    smoothing={"label_smoothing": 0.2},
    only_smoothing={"label_smoothing": 1.0, "reduction": "none"},
    class_weights={"weight": class_weights()},
    class_weights_and_smoothing={"weight": class_weights(), "label_smoothing": 0.3, "reduction": "none"},
    token_weights={"token_weight": per_token(1, positive=False), "reduction": "sum"},
    z_loss={"z_loss": 0.01},
    softcap={"softcap": 3.0},
    temperature={"temperature": 0.7},
    row_temperature={"temperature": per_token(2)},
    ignore_index={"ignore_index": 3},
    num_items={"num_items": torch.tensor(50)},
    low_rank={"rank": 4},
    small_budget={"memory_budget_mib": 0.02, "label_smoothing": 0.1},
    lean={"mode": "lean"},
    statistics={"return_stats": STREAMED},
    statistics_that_rank={"return_stats": ("rank", "entropy"), "label_smoothing": 0.1},
    everything={
        "rank": 3,
        "weight": class_weights(),
        "token_weight": per_token(1, positive=False),
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "softcap": 4.0,
        "temperature": per_token(2),
        "num_items": 40,
        "return_stats": STREAMED,
    },
)
def loss(group, rank=0, **options):
    leaves, target = make_problem(rank=rank)
    if "ignore_index" in options:
        target = target.masked_fill(target < 0, options["ignore_index"])
    for sizes in SIZES[dist.get_world_size(group)]:
        compare_loss(group, sizes, leaves, target, options)


@cases(
    2,
    head={"frozen": ("weight", "bias")},
    input={"frozen": ("input",)},
    everything={"frozen": ("input", "weight", "bias")},
)
def frozen(group, frozen):
    leaves, target = make_problem()
    compare_loss(group, SIZES[2][0], leaves, target, {"return_stats": ("entropy",)}, frozen=frozen)


@check(2)
def module(group):
    leaves, target = make_problem()
    part, options = part_of(SIZES[2][0], group), {"label_smoothing": 0.1, "softcap": 5.0}
    ours = CutCrossEntropyLoss(class_weights()[part], vocab_parallel_group=group, **options)
    found = ours(leaves["input"], leaves["weight"][part], target, leaves["bias"][part])
    assert_close("loss", found, call(linear_cross_entropy, leaves, target, weight=class_weights(), **options))


@check(2)
def group_of_one(group):
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    leaves, target = make_problem()
    compare_loss(alone, (V,), leaves, target, {"return_stats": STREAMED, "label_smoothing": 0.1})


@check(2)
def main_grad(group):
    leaves, target = make_problem(torch.bfloat16)
    part = part_of(SIZES[2][0], group)
    whole, mine = fresh(leaves), fresh(leaves, part)
    for weight in (whole["weight"], mine["weight"]):
        weight.main_grad = torch.ones(weight.shape)
    call(linear_cross_entropy, whole, target, mode="lean").backward()
    call(linear_cross_entropy, mine, target, vocab_parallel_group=group).backward()
    assert mine["weight"].grad is None
    assert_close("main_grad", mine["weight"].main_grad, whole["weight"].main_grad[part], rtol=1e-2, atol=1e-4)
    assert (mine["weight"].main_grad != 1).any()


@cases(2, empty={"shape": (0,)}, ignored={"shape": (2, 3)})
def nothing_to_learn_from(group, shape):
    part = part_of(SIZES[2][0], group)
    leaves = fresh({"input": torch.randn(*shape, D), "weight": torch.randn(V, D)}, part)
    target = torch.full(shape, -100)
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction, "weight": torch.ones(V)[part], "vocab_parallel_group": group}
        loss = call(linear_cross_entropy, leaves, target, **options)
        assert torch.equal(loss, torch.zeros_like(loss))
        for gradient in torch.autograd.grad(loss.sum(), list(leaves.values())):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@cases(2, float32={"dtype": torch.float32}, bfloat16={"dtype": torch.bfloat16}, autocast={"dtype": None})
def precision(group, dtype):
    """Within the error budget of eager PyTorch in the same dtype."""
    leaves, target = make_problem(dtype or torch.float32)
    valid = target >= 0

    def eager(leaves, dtype):
        z = F.linear(*(leaf.to(dtype) for leaf in leaves.values()))
        return F.cross_entropy((z if dtype == torch.float64 else z.float())[valid], target[valid])

    for sizes in SIZES[2]:
        part = part_of(sizes, group)
        mine, twin, truth = fresh(leaves, part), fresh(leaves), fresh(leaves)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
            ours = call(linear_cross_entropy, mine, target, vocab_parallel_group=group)
        theirs, exact = eager(twin, dtype or torch.bfloat16), eager(truth, torch.float64)
        assert ours.dtype == torch.float32
        assert_within_budget("loss", ours.detach(), theirs.detach(), exact.detach())
        got, a, b = (gradients([x], y) for x, y in ((ours, mine), (theirs, twin), (exact, truth)))
        for name, gradient in got.items():
            assert gradient.dtype == leaves[name].dtype
            rows = slice(None) if name == "input" else part
            assert_within_budget(name, gradient, a[name][rows], b[name][rows])


@check(4)
def input_gradient_is_rounded_once(group):
    """Shares of 256 and three times 0.34 make 258 in 8 bits; the last that is added to 256 alone would be lost."""
    weight = torch.zeros(2, 4).bfloat16()
    weight[0] = 8 * 0.34
    weight[0, dist.get_rank(group)] = 8 * 256  # in each column on another rank, as the order of ranks is not known
    input = torch.zeros(1, 4).bfloat16().requires_grad_()  # all eight entries are equally likely
    linear_cross_entropy(input, weight, torch.tensor([3]), vocab_parallel_group=group).backward()
    assert_close("gradient", input.grad, torch.full((1, 4), 258.0).bfloat16(), rtol=0, atol=0)


@cases(
    2,
    4,
    streamed={"stats": STREAMED},
    closed={"stats": STREAMED + RANKING, "top_p": 0.8, "top_k": 7},
    open={"stats": RANKING, "top_p": 0.5, "nucleus": "open", "top_k": 64},
    narrow={"stats": RANKING, "top_p": 1e-4, "top_k": 1},
    empty={"stats": RANKING, "top_p": 1e-4, "top_k": 1, "nucleus": "open"},
    whole={"stats": ("nucleus_entropy",), "top_p": 1.0},
    without_a_target={"stats": ("entropy", "argmax", "nucleus_entropy"), "top_p": 0.9, "no_target": True},
    options={
        "stats": STREAMED + RANKING,
        "top_p": 0.9,
        "top_k": 5,
        "softcap": 4.0,
        "temperature": per_token(2),
        "rank": 2,
    },
)
def statistics(group, stats, rank=0, no_target=False, **options):
    leaves, target = make_problem(rank=rank)
    target = None if no_target else target
    for sizes in SIZES[dist.get_world_size(group)]:
        part = part_of(sizes, group)
        whole, mine = fresh(leaves), fresh(leaves, part)
        expected = call(linear_head_stats, whole, target, stats=stats, **options)
        found = call(linear_head_stats, mine, target, stats=stats, vocab_parallel_group=group, **options)
        for name in stats:
            assert_close(name, getattr(found, name).detach(), getattr(expected, name).detach())
        names = [name for name in stats if name in DIFFERENTIABLE]
        got, want = (gradients([getattr(x, n) for n in names], y) for x, y in ((found, mine), (expected, whole)))
        assert_same_gradients(got, want, part)


@cases(2, closed={"nucleus": "closed"}, open={"nucleus": "open"})
def ties(group, nucleus):
    """Small integers, so that equal logits lie on several ranks; some entries are masked out."""
    generator, size = torch.Generator().manual_seed(2), 40
    leaves = {
        "input": torch.randint(-1, 2, (3, 7, D), generator=generator).double(),
        "weight": torch.randint(-2, 3, (size, D), generator=generator).double(),
        "bias": torch.randint(-3, 4, (size,), generator=generator).double(),
    }
    leaves["bias"][::5] = -torch.inf
    target = 1 + 5 * torch.randint(8, (3, 7), generator=generator)
    stats = ("argmax", "rank", "nucleus_entropy", "topk_entropy", "topk_mass", "entropy", "varentropy")
    for sizes in ((27, 13), (0, size), (1, 39)):  # the last one's first rank has nothing but a masked entry
        for top_p in (0.3, 0.9):
            options = {"stats": stats, "top_p": top_p, "nucleus": nucleus, "top_k": 9}
            whole, mine = fresh(leaves), fresh(leaves, part_of(sizes, group))
            expected = call(linear_head_stats, whole, target, **options)
            found = call(linear_head_stats, mine, target, vocab_parallel_group=group, **options)
            for name in stats:
                got, want = getattr(found, name).detach(), getattr(expected, name).detach()
                assert_close(f"{name} at {top_p}, {sizes}", got, want)
            sums = [x.entropy.sum() + x.nucleus_entropy.sum() for x in (found, expected)]
            got, want = (gradients([x], y) for x, y in zip(sums, (mine, whole), strict=True))
            assert_same_gradients(got, want, part_of(sizes, group))


@check(2)
def rows_of_nan(group):
    """One hidden state is not finite: its row is NaN as in one process, its argmax an id that exists."""
    leaves, target = make_problem()
    leaves["input"][1, 2] = torch.nan
    stats = STREAMED + RANKING
    options = {"stats": stats, "top_p": 0.9, "top_k": 3}
    expected = call(linear_head_stats, leaves, target, **options)
    mine = fresh(leaves, part_of(SIZES[2][0], group))
    found = call(linear_head_stats, mine, target, vocab_parallel_group=group, **options)
    for name in stats:
        got, want = getattr(found, name).detach(), getattr(expected, name)
        torch.testing.assert_close(got, want, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


@cases(2, 4, plain={}, smoothing={"label_smoothing": 0.1, "z_loss": 0.01})
def skipped_mass_is_bounded(group, **options):
    """What all ranks leave out of a row together is at most its tolerance, and so is the error of its gradient."""
    tolerance = 1e-2
    leaves, target = make_problem(scale=30.0)
    for sizes in SIZES[dist.get_world_size(group)]:
        part = part_of(sizes, group)
        whole, mine = fresh(leaves), fresh(leaves, part)
        options |= {"reduction": "sum", "return_stats": ("skipped_mass", "surviving_share")}
        exact = call(linear_cross_entropy, whole, target, **options | {"return_stats": ()})
        loss, stats = call(
            linear_cross_entropy, mine, target, vocab_parallel_group=group, skip_tol=tolerance, **options
        )
        assert_close("loss", loss.detach(), exact.detach())
        valid = target >= 0
        assert (stats.skipped_mass >= 0).all()
        assert (stats.skipped_mass <= tolerance).all()
        assert (stats.skipped_mass[valid] > 0).any()
        assert (stats.surviving_share[~valid] == 0).all()
        assert ((stats.surviving_share[valid] > 0) & (stats.surviving_share[valid] < 1)).all()
        got = dict(zip(mine, torch.autograd.grad(loss, list(mine.values())), strict=True))
        want = dict(zip(whole, torch.autograd.grad(exact, list(whole.values())), strict=True))
        lse = call(linear_head_stats, leaves, target, stats=("lse",)).lse
        of_p = 1 + 2 * options.get("z_loss", 0.0) * lse.abs()  # what a probability is multiplied by
        bound = of_p * stats.skipped_mass * leaves["weight"].norm(dim=1).max()
        error = (got["input"] - want["input"]).norm(dim=-1)
        assert (error <= bound + 1e-9).all()
        assert error.max() > 0
        bound = (of_p * stats.skipped_mass * leaves["input"].norm(dim=-1)).sum()
        assert ((got["weight"] - want["weight"][part]).norm(dim=1) <= bound + 1e-9).all()


@check(2)
def ranks_share_what_may_be_skipped(group):
    """Four tiles of 512, the target in the first, equal masses in the others: two of them here, one there."""
    tolerance, mine = 0.1, part_of((1024, 1024), group)
    for mass, skipped in ((0.4 * tolerance, 2), (0.8 * tolerance, 0)):
        bias = torch.full((2048,), -torch.inf, dtype=torch.float64)
        bias[0], bias[512::512] = math.log(1 - 3 * mass), math.log(mass)
        leaves = {"input": torch.zeros(1, 1), "weight": torch.zeros(2048, 1), "bias": bias}
        leaves = fresh({name: leaf.double() for name, leaf in leaves.items()}, mine)
        options = {"skip_tol": tolerance, "return_stats": ("skipped_mass",), "vocab_parallel_group": group}
        _, stats = call(linear_cross_entropy, leaves, torch.tensor([0]), **options)
        assert_close("skipped mass", stats.skipped_mass, torch.tensor([skipped * mass], dtype=torch.float64))


@check(2)
def surviving_share_counts_tiles(group):
    """Of seven tiles, five here and two there, rows that are sure of their target keep its tile alone."""
    sizes = (2100, 900)
    leaves = {"input": 100 * torch.eye(D, dtype=torch.float64), "weight": torch.zeros(3000, D, dtype=torch.float64)}
    target = 240 * torch.arange(D)
    leaves["weight"][target] = torch.eye(D, dtype=torch.float64)
    mine = fresh(leaves, part_of(sizes, group))
    names = ("surviving_share",)
    _, stats = call(linear_cross_entropy, mine, target, skip_tol=1e-3, return_stats=names, vocab_parallel_group=group)
    assert_close("share", stats.surviving_share, torch.full((D,), 1 / 7, dtype=torch.float64))


@cases(
    2,
    plain=({"more": {}}),
    class_weights={"weight": class_weights(), "label_smoothing": 0.1, "more": {"all_reduce sum": 1}},
    argmax={"return_stats": ("argmax", "entropy", "varentropy"), "more": {"all_reduce min": 1}},
    skipping={"skip_tol": 1e-3, "more": {"all_reduce sum": 1}},
    all_options={"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0, "temperature": per_token(2), "more": {}},
)
def collectives(group, more, **options):
    """One max and one sum a forward pass, one sum a backward pass."""
    leaves, target = make_problem()
    part = part_of(SIZES[2][0], group)
    if "weight" in options:
        options["weight"] = options["weight"][part]
    with counted_collectives() as counts:
        loss = call(linear_cross_entropy, fresh(leaves, part), target, vocab_parallel_group=group, **options)
        forward = dict(counts)
        counts.clear()
        (loss[0] if isinstance(loss, tuple) else loss).backward()
    expected = {"all_gather": 1, "all_reduce max": 1, "all_reduce sum": 1}
    for name, count in more.items():
        expected[name] = expected.get(name, 0) + count
    assert forward == expected, forward
    assert counts == {"all_reduce sum": 1}, counts
    with counted_collectives() as counts:
        mine = fresh(leaves, part, frozen=("input",))
        call(linear_cross_entropy, mine, target, vocab_parallel_group=group).backward()
    assert counts == {"all_gather": 1, "all_reduce max": 1, "all_reduce sum": 1}, counts


@cases(
    2,
    statistics={"return_stats": STREAMED, "label_smoothing": 0.1, "weight": class_weights().float()},
    low_rank={"rank": 3, "softcap": 5.0, "reduction": "none"},
)
def triton(group, rank=0, **options):
    """The kernels, in Triton's interpreter."""
    leaves, target = make_problem(torch.float32, rank=rank)
    for sizes in ((1700, 900), (0, V)):
        part = part_of(sizes, group)
        whole, mine = fresh(leaves), fresh(leaves, part)
        expected = call(linear_cross_entropy, whole, target, impl="torch", **options)
        cut = options | ({"weight": options["weight"][part]} if "weight" in options else {})
        found = call(linear_cross_entropy, mine, target, impl="triton", vocab_parallel_group=group, **cut)
        if isinstance(found, tuple):
            (expected, theirs), (found, ours) = expected, found
            for name in options["return_stats"]:
                assert_close(name, getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-5)
        assert_close("loss", found.detach(), expected.detach(), rtol=1e-5, atol=1e-5)
        assert_same_gradients(gradients([found], mine), gradients([expected], whole), part, rtol=1e-4, atol=1e-5)


def main(folder):
    """Every check of so many ranks, each in a group of its own; writes what went wrong by name."""
    dist.init_process_group("gloo", timeout=TIMEOUT * 4)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    failures, failed = dict.fromkeys(CHECKS[ranks], "not run: too many failed before"), 0
    for name, function in CHECKS[ranks].items():
        if not rank:
            print(name, flush=True)  # in case that a process dies of it
        group = dist.new_group(timeout=TIMEOUT)
        torch.manual_seed(0)
        try:
            function(group)
            failures[name] = None
        except Exception:
            failures[name] = traceback.format_exc()
        on_ranks = [None] * ranks
        dist.all_gather_object(on_ranks, failures[name] is not None)
        failed += any(on_ranks)
        if failed > MOST_FAILURES:
            break
    (folder / f"rank{rank}.json").write_text(json.dumps(failures))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
