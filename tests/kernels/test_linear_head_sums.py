"""Streaming sums: any tiling, any number of shares, any order of merging gives the numbers of the whole row."""

import math
from dataclasses import fields
from itertools import pairwise

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from litropy.kernels.linear_head_reference import linear_head_reference
from litropy.kernels.linear_head_sums import Sums, finish_sums, merge_sums
from litropy.kernels.linear_head_torch import add_tile
from litropy.kernels.linear_head_types import Head, Want

WANT = Want(entropy=True, mean_logprob=True, argmax=True, varentropy=True, collision=True, entropy_drift=True)
NAMES = ("logprob", "lse", "max_logprob", "entropy", "mean_logprob", "varentropy", "collision", "entropy_drift")
ROWS = 3


def sums_of(z, columns, cuts, target, c):
    """Sums of the columns of a slice, tile by tile, and the weight of the mean that lies in it."""
    head = Head(weight=z.new_empty(z.shape[1], 0), mean_weight=c)
    sums = Sums.start((ROWS,), z, z.dtype, True, WANT)
    edges = [columns.start, *(cut for cut in cuts if columns.start < cut < columns.stop), columns.stop]
    for start, stop in pairwise(edges):
        if stop > start:
            tile = z[:, start:stop].clone()
            add_tile(sums, slice(None), tile, torch.empty_like(tile), torch.empty_like(tile), start, head, target)
    return sums


def stacked(parts):
    return Sums(*(torch.stack([getattr(part, x.name) for part in parts]) for x in fields(Sums)))


@st.composite
def problems(draw):
    V = draw(st.integers(1, 24))
    logit = st.one_of(st.floats(-30, 30), st.sampled_from((-math.inf, 0.0, 1.0, -1e4, 1e4)))
    z = torch.tensor(draw(st.lists(st.lists(logit, min_size=V, max_size=V), min_size=ROWS, max_size=ROWS)))
    z[:, draw(st.integers(0, V - 1))] = 0.5  # at least one entry has probability
    c = torch.tensor(draw(st.lists(st.sampled_from((0.0, 0.5, 2.0)), min_size=V, max_size=V)))
    return {
        "z": z.double(),
        # an entry of weight and no probability makes the mean -inf in any order; it is tested elsewhere
        "c": c.double().masked_fill((z == -math.inf).any(0), 0) / V,
        "target": torch.tensor(draw(st.lists(st.integers(0, V - 1), min_size=ROWS, max_size=ROWS))),
        "tiles": sorted(draw(st.lists(st.integers(0, V), max_size=6))),
        "shares": sorted(draw(st.lists(st.integers(0, V), max_size=4))),
        "order": draw(st.randoms(use_true_random=False)),
    }


@settings(deadline=None, max_examples=200, derandomize=True)
@given(problems())
def test_any_shares_in_any_order_give_the_same(problem):
    z, c, target = problem["z"], problem["c"], problem["target"]
    edges = [0, *problem["shares"], z.shape[1]]
    shares = [slice(a, b) for a, b in pairwise(edges)]
    parts = []
    for share in shares:
        # every share starts afresh, as on a rank of its own
        own = sums_of(z[:, share], slice(0, share.stop - share.start), [x - share.start for x in problem["tiles"]],
                      target - share.start, c[share])  # fmt: skip
        own.argmax += share.start
        parts.append((own, c[share].sum()))
    in_order = merge_sums(stacked([sums for sums, _ in parts]), torch.stack([seen for _, seen in parts])[:, None])
    problem["order"].shuffle(parts)
    while len(parts) > 1:  # a random tree
        (a, seen_a), (b, seen_b), *rest = parts
        merged = merge_sums(stacked([a, b]), torch.stack([seen_a, seen_b])[:, None])
        parts = [*rest, (merged, seen_a + seen_b)]
        problem["order"].shuffle(parts)
    truth = reference_of_logits(z, target, c)
    total = c.sum()
    for sums in (in_order, parts[0][0]):
        stats = finish_sums(sums, target, total, WANT)
        for name in NAMES:
            torch.testing.assert_close(getattr(stats, name), truth[name], rtol=1e-9, atol=1e-9, msg=name)
    # only in the order of the columns does a tie keep the lowest index
    assert torch.equal(in_order.argmax, z.argmax(1))
    assert torch.equal(z.gather(1, parts[0][0].argmax[:, None]), z.amax(1, keepdim=True))


def reference_of_logits(z, target, c):
    """The reference for given logits: those of a bias."""
    nothing, head = torch.zeros(1, 1, dtype=z.dtype), torch.zeros(z.shape[1], 1, dtype=z.dtype)
    rows = [linear_head_reference(nothing, head, z[i], target[i : i + 1], mean_weight=c) for i in range(ROWS)]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@settings(deadline=None, max_examples=50, derandomize=True)
@given(V=st.integers(1, 40), tile=st.integers(1, 40), masked=st.integers(0, 40), seed=st.integers(0, 1000))
@example(V=40, tile=7, masked=21, seed=0)  # the first three tiles are all -inf
def test_any_tiling_gives_the_same(V, tile, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    z = 5 * torch.randn(ROWS, V, generator=generator, dtype=torch.float64)
    z[:, : min(masked, V - 1)] = -math.inf
    target = torch.randint(V, (ROWS,), generator=generator)
    c = torch.rand(V, generator=generator, dtype=torch.float64).masked_fill(z[0] == -math.inf, 0)
    sums = sums_of(z, slice(0, V), range(0, V, tile), target, c)
    stats, truth = finish_sums(sums, target, c.sum(), WANT), reference_of_logits(z, target, c)
    for name in NAMES:
        torch.testing.assert_close(getattr(stats, name), truth[name], rtol=1e-9, atol=1e-9, msg=name)
    assert torch.equal(stats.argmax, z.argmax(1))


def test_the_sums_of_nothing_are_neutral():
    z, target, c = torch.randn(ROWS, 9, dtype=torch.float64), torch.tensor([0, 4, 8]), torch.rand(9).double()
    nothing = Sums.start((ROWS,), z, z.dtype, True, WANT)
    for position in range(3):
        parts = [nothing, nothing]
        parts.insert(position, sums_of(z, slice(0, 9), [4], target, c))
        seen = torch.zeros(3, 1, dtype=torch.float64)
        seen[position] = c.sum()
        merged = merge_sums(stacked(parts), seen)
        for mine, whole in zip(vars(merged).values(), vars(parts[position]).values(), strict=True):
            torch.testing.assert_close(mine, whole)


def test_a_target_that_no_part_holds_is_nan():
    z = torch.randn(ROWS, 9)
    c = torch.full((9,), 1 / 9)
    target = torch.tensor([2, 9, -1])
    logprob = finish_sums(sums_of(z, slice(0, 9), [], target, c), target, 1.0, WANT).logprob
    assert logprob.isnan().tolist() == [False, True, False]
    assert logprob[2] == 0
