"""Checks of cut heads that are DTensors, under torch.compile, under FSDP2 and on meshes; and of errors."""

import re
from collections import Counter

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from vocab_parallel_problems import (
    SIZES,
    V,
    assert_close,
    call,
    cases,
    check,
    class_weights,
    counted_collectives,
    fresh,
    gradients,
    make_problem,
    part_of,
    same_on_every_rank,
)

from litropy.losses import linear_cross_entropy, linear_head_stats


def distributed(leaves, mesh, placements):
    """Leaves as DTensors where a placement is named."""
    return {
        name: distribute_tensor(leaf, mesh, placements[name]).requires_grad_() if name in placements else leaf
        for name, leaf in fresh(leaves).items()
    }


@cases(2, cut={"placement": Shard(0)}, replicated={"placement": Replicate()})
def dtensor_head(group, placement):
    """A head of 2601 entries, which two ranks do not share evenly; gradients come back placed like the head."""
    leaves, target = make_problem(V=V + 1)
    mesh = init_device_mesh("cpu", (2,))
    whole = fresh(leaves)
    names = ("entropy", "argmax")
    expected, theirs = call(linear_cross_entropy, whole, target, return_stats=names)
    want = gradients([expected], whole)
    for input_too in (False, True):
        placements = {"weight": [placement], "bias": [placement]} | ({"input": [Replicate()]} if input_too else {})
        mine = distributed(leaves, mesh, placements)
        ids = distribute_tensor(target, mesh, [Replicate()]) if input_too else target
        with counted_collectives() as counts:
            loss, stats = call(linear_cross_entropy, mine, ids, return_stats=names)
        assert bool(counts) == placement.is_shard()
        assert_close("loss", loss.detach(), expected.detach())
        for name in names:
            assert_close(name, getattr(stats, name), getattr(theirs, name))
        loss.backward(torch.randn((), generator=torch.Generator().manual_seed(1), dtype=torch.float64))
        for name, leaf in mine.items():
            gradient = leaf.grad
            assert isinstance(gradient, DTensor) == (name in placements)
            if name in placements:
                assert list(gradient.placements) == placements[name]
                assert gradient.shape == leaves[name].shape
                gradient = gradient.full_tensor()
            assert_close(name, gradient, want[name])


@check(2)
def dtensor_statistics(group):
    leaves, target = make_problem()
    mine = distributed(leaves, init_device_mesh("cpu", (2,)), {"weight": [Shard(0)], "bias": [Shard(0)]})
    stats = ("entropy", "rank", "nucleus_entropy")
    found = call(linear_head_stats, mine, target, stats=stats, top_p=0.9)
    whole = fresh(leaves)
    expected = call(linear_head_stats, whole, target, stats=stats, top_p=0.9)
    for name in stats:
        assert_close(name, getattr(found, name).detach(), getattr(expected, name).detach())
    got = torch.autograd.grad(found.nucleus_entropy.sum(), mine["weight"])[0]
    want = torch.autograd.grad(expected.nucleus_entropy.sum(), whole["weight"])[0]
    assert_close("weight", got.full_tensor(), want)


# ------------------------------------------------------------------------------------------------------------- compile


@cases(2, none={"reduction": "none"}, class_weights={"weight": class_weights()})
def compiled(group, **options):
    leaves, target = make_problem()
    part = part_of(SIZES[2][0], group)
    if "weight" in options:
        options["weight"] = options["weight"][part]

    def loss_of(leaves, target):
        loss, stats = call(
            linear_cross_entropy,
            leaves,
            target,
            return_stats=("entropy", "argmax"),
            vocab_parallel_group=group,
            **options,
        )
        more = call(linear_head_stats, leaves, target, stats=("varentropy", "rank"), vocab_parallel_group=group)
        return (loss.sum(), more.varentropy.sum()), (stats.entropy, stats.argmax, more.rank)

    results = []
    for function in (torch.compile(loss_of, fullgraph=True, backend="aot_eager"), loss_of):
        mine = fresh(leaves, part)
        sums, detached = function(mine, target)
        results.append((*[x.detach() for x in sums], *detached, *gradients(sums, mine).values()))
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        assert_close(f"output {i}", got, want)


@check(2)
def compiled_dtensor(group):
    leaves, target = make_problem()
    mesh = init_device_mesh("cpu", (2,))

    def loss_of(input, weight, target):
        return linear_cross_entropy(input, weight, target, z_loss=0.01)

    results = []
    for function in (torch.compile(loss_of, fullgraph=True, backend="aot_eager"), loss_of):
        mine = distributed(leaves, mesh, {"weight": [Shard(0)]})
        loss = function(mine["input"], mine["weight"], target)
        loss.backward()
        results.append((loss.detach(), mine["input"].grad, mine["weight"].grad.to_local()))
    for got, want in zip(*results, strict=True):
        assert_close("result", got, want)


# ---------------------------------------------------------------------------------------------------------------- FSDP


class Model(nn.Module):
    """Embedding and head, whose loss is computed inside ``forward``."""

    def __init__(self, leaves):
        super().__init__()
        self.head = nn.Linear(1, 1)
        self.head.weight = nn.Parameter(leaves["weight"].clone())
        self.head.bias = nn.Parameter(leaves["bias"].clone())

    def forward(self, input, target, **options):
        return linear_cross_entropy(input, self.head.weight, target, linear_bias=self.head.bias, **options)


def own_tokens(leaves, target, rank, ranks):
    """The tokens of one data-parallel rank, as many on each."""
    rows = slice(rank * (21 // ranks), (rank + 1) * (21 // ranks))
    return leaves["input"].flatten(0, 1)[rows], target.flatten()[rows]


@check(2)
def fsdp_gathers_the_head_once_a_step(group):
    leaves, target = make_problem()
    model = fully_shard(Model(leaves), mesh=init_device_mesh("cpu", (2,)))
    input, target = own_tokens(leaves, target, dist.get_rank(), 2)
    for _ in range(2):
        with counted_collectives() as counts:
            model(input.clone().requires_grad_(), target).backward()
        kinds = Counter()  # what the functions are called depends on the version of torch
        for name, count in counts.items():
            kinds[next(kind for kind in ("all_gather", "reduce_scatter", name) if name.startswith(kind))] += count
        assert kinds == {"all_gather": 1, "reduce_scatter": 1}, counts
        assert isinstance(model.head.weight.grad, DTensor)


@cases(2, equal_counts={"extra": 0}, other_counts={"extra": 1})
def fsdp_head_outside_its_module(group, extra):
    """Its shards look like a cut vocabulary; that ranks hold different tokens gives it away."""
    leaves, target = make_problem()
    model = fully_shard(Model(leaves), mesh=init_device_mesh("cpu", (2,)))
    input, target = own_tokens(leaves, target, dist.get_rank(), 2)
    if extra and dist.get_rank():
        input, target = input[extra:], target[extra:]
    raises_everywhere(
        "hold different tokens .* compute the loss inside the module's forward",
        lambda: linear_cross_entropy(input, model.head.weight, target, linear_bias=model.head.bias),
    )


# -------------------------------------------------------------------------------------------------------------- meshes


@cases(4, by_hand={"fsdp": False}, fsdp={"fsdp": True})
def tensor_and_data_parallel(group, fsdp):
    """The head is cut over two ranks, twice; each pair has its own half of the tokens."""
    leaves, target = make_problem()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    items, options = int((target.flatten()[:20] >= 0).sum()), {"label_smoothing": 0.1, "z_loss": 0.01}
    whole = fresh(leaves)
    expected = call(
        linear_cross_entropy,
        whole | {"input": whole["input"].flatten(0, 1)[:20]},
        target.flatten()[:20],
        num_items=items,
        **options,
    )
    expected.backward()

    model = Model(leaves)
    for name, parameter in model.head.named_parameters():
        cut = distribute_tensor(parameter.detach(), mesh["tensor"], [Shard(0)])
        setattr(model.head, name, nn.Parameter(cut))
    if fsdp:
        fully_shard(model, mesh=mesh["data"])
        model.set_gradient_divide_factor(1.0)
    rank = mesh.get_local_rank("data")
    input, target = own_tokens(leaves, target, rank, 2)
    input = input.clone().requires_grad_()
    loss = model(input, target, num_items=items, **options)
    loss.backward()
    data = mesh.get_group("data")
    total = loss.detach().clone()
    dist.all_reduce(total, group=data)
    assert_close("loss", total, expected.detach())
    assert_close("input", input.grad, own_tokens({"input": whole["input"].grad}, target, rank, 2)[0])
    for name, parameter in model.head.named_parameters():
        gradient = parameter.grad
        assert gradient.placements == parameter.placements
        if not fsdp:
            assert list(gradient.placements) == [Shard(0)]
            dist.all_reduce(gradient.to_local(), group=data)
        assert_close(name, gradient.full_tensor(), whole[name].grad)


# -------------------------------------------------------------------------------------------------------------- errors


def error_of(function):
    """What a ValueError says, or that there is none."""
    try:
        function()
    except ValueError as error:
        return str(error)
    return "no error"


def raises_everywhere(message, function):
    """Every rank raises the same ValueError, and none waits for another."""
    text = error_of(function)
    same = same_on_every_rank(text)
    assert re.search(message, text), text
    assert same, text


@cases(
    2,
    4,
    other_targets={"change": lambda x, y, r: (x, y.masked_fill(y == y[1, 2], 5 + r)), "message": "different tokens"},
    other_order={"change": lambda x, y, r: (x, y.flip(0) if r else y), "message": "different tokens"},
    other_count={"change": lambda x, y, r: (x[r % 2 :], y[r % 2 :]), "message": "different tokens .*14"},
    no_tokens_on_one={"change": lambda x, y, r: (x[3 * r :], y[3 * r :]), "message": "different tokens .*, 0"},
    beyond_the_shards={"change": lambda x, y, r: (x, y.masked_fill(y == y[1, 2], V)), "message": f"holds {V}, but"},
)
def targets_that_do_not_fit(group, change, message):
    leaves, target = make_problem()
    sizes = SIZES[dist.get_world_size(group)][0]
    input, target = change(leaves["input"], target, dist.get_rank(group))
    leaves = fresh(leaves | {"input": input}, part_of(sizes, group))
    raises_everywhere(message, lambda: call(linear_cross_entropy, leaves, target, vocab_parallel_group=group))
    raises_everywhere(message, lambda: call(linear_head_stats, leaves, target, vocab_parallel_group=group))


@check(2)
def other_count_without_targets(group):
    leaves, _ = make_problem()
    leaves = leaves | {"input": leaves["input"][dist.get_rank(group) :]}
    leaves = fresh(leaves, part_of(SIZES[2][0], group))
    options = {"stats": ("entropy",), "vocab_parallel_group": group}
    raises_everywhere("different tokens", lambda: call(linear_head_stats, leaves, None, **options))


@check(2)
def no_entries_at_all(group):
    leaves, _ = make_problem(V=0)
    options = {"stats": ("entropy",), "vocab_parallel_group": group}
    raises_everywhere("no rows", lambda: call(linear_head_stats, leaves, None, **options))


@check(2)
def no_whole_shards(group):
    """Both ranks pass the first half of the head."""
    leaves, target = make_problem()
    leaves = fresh(leaves, slice(0, V // 4))
    raises_everywhere(
        f"cover {2 * (V // 4)} entries",
        lambda: call(linear_cross_entropy, leaves, target, vocab_parallel_group=group),
    )


@cases(
    2,
    group_as_well={"weight": [Shard(0)], "bias": [Shard(0)], "group_too": True, "message": "leave the group out"},
    by_columns={"weight": [Shard(1)], "message": "only a head that is cut by rows"},
    bias_is_plain={"weight": [Shard(0)], "plain_bias": True, "message": "placed like `linear_weight`"},
    bias_elsewhere={"weight": [Shard(0)], "bias": [Replicate()], "message": "placed like `linear_weight`"},
    only_input={"input": [Replicate()], "message": "`input` is a DTensor but `linear_weight` is not"},
    only_bias={"bias": [Replicate()], "message": "`linear_bias` is a DTensor but"},
    cut_input={"weight": [Shard(0)], "bias": [Shard(0)], "input": [Shard(0)], "message": "redistribute to Replicate"},
)
def placements_that_do_not_fit(group, message, group_too=False, plain_bias=False, **placements):
    leaves, target = make_problem()
    mesh = init_device_mesh("cpu", (2,))
    if "bias" not in placements and not plain_bias:
        del leaves["bias"]
    mine = distributed(leaves, mesh, placements)
    chosen = group if group_too else None
    raises_everywhere(message, lambda: call(linear_cross_entropy, mine, target, vocab_parallel_group=chosen))


@check(4)
def cut_along_two_dimensions(group):
    leaves, target = make_problem()
    del leaves["bias"]
    mine = distributed(leaves, init_device_mesh("cpu", (2, 2)), {"weight": [Shard(0), Shard(0)]})
    raises_everywhere("along one mesh dimension", lambda: call(linear_cross_entropy, mine, target))


@check(2)
def groups_that_cannot_be_used(group):
    leaves, target = make_problem()
    gone = dist.new_group()
    dist.destroy_process_group(gone)
    outside = dist.new_group([0])  # on rank 1 this is no group
    mesh = init_device_mesh("cpu", (2,))
    for wrong in (gone, mesh, *([outside] if dist.get_rank() else [])):
        text = error_of(lambda group=wrong: call(linear_cross_entropy, leaves, target, vocab_parallel_group=group))
        assert text.startswith("`vocab_parallel_group`"), text


@check(2)
def no_gradient_in_the_forward_pass(group):
    leaves, target = make_problem()
    leaves = fresh(leaves, part_of(SIZES[2][0], group))
    options = {"vocab_parallel_group": group, "mode": "fast"}
    raises_everywhere("the vocabulary is sharded", lambda: call(linear_cross_entropy, leaves, target, **options))
