"""What the checks of heads that are cut over processes share: a register of checks, a problem, and comparisons."""

from collections import Counter
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist

from litropy.losses import linear_cross_entropy

V, D = 2600, 12
# entries that each rank holds, by the number of ranks
SIZES = {2: [(1700, 900), (0, V)], 4: [(1100, 300, 0, 1200), (600, 650, 650, 700)]}
STREAMED = ("logprob", "entropy", "lse", "varentropy", "collision", "max_logprob", "argmax", "entropy_drift")
RANKING = ("nucleus_entropy", "topk_entropy", "topk_mass", "rank")
DIFFERENTIABLE = ("logprob", "entropy", "lse", "varentropy", "nucleus_entropy")

CHECKS = {2: {}, 4: {}}  # by number of ranks and name; a check takes the process group


def check(*ranks):
    """Register a check for so many ranks."""
    return cases(*ranks, **{"": {}})


def cases(*ranks, **named):
    """Register a check once for each named set of arguments."""

    def register(function):
        for case, arguments in named.items():
            name = f"{function.__name__}-{case}" if case else function.__name__
            for n in ranks:
                CHECKS[n][name] = partial(function, **arguments)
        return function

    return register


def make_problem(dtype=torch.float64, V=V, scale=2.0, rank=0):
    """Leaves by name and targets of which some are ignored, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    leaves = {"input": randn(3, 7, D), "weight": scale * randn(V, D) / D**0.5, "bias": randn(V)}
    if rank:
        leaves |= {"u": randn(3, 7, rank), "low_rank": randn(V, rank) / rank**0.5}
    target = torch.randint(max(1, V), (3, 7), generator=generator)
    target[0, :3] = target[2, 6] = -100
    return {name: leaf.to(dtype) for name, leaf in leaves.items()}, target


def per_token(seed, positive=True):
    """A number for each token of the problem."""
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 0.5 + x.sigmoid() if positive else x


def class_weights():
    """A weight for each entry, some of them 0."""
    weights = torch.rand(V, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return weights.masked_fill(torch.arange(V) % 7 == 0, 0)


def part_of(sizes, group):
    """Entries that this rank holds."""
    rank = dist.get_rank(group)
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def of_part(name, value, part):
    """A leaf, or its gradient, as the rank sees it that holds these entries."""
    return value if name in ("input", "u") else value[part]


def fresh(leaves, part=slice(None), frozen=()):
    """New leaves, of which this rank holds a part."""
    parts = {name: of_part(name, leaf, part) for name, leaf in leaves.items()}
    return {name: leaf.detach().clone().requires_grad_(name not in frozen) for name, leaf in parts.items()}


def call(function, leaves, target, **options):
    """A public function of these leaves."""
    if "u" in leaves:
        options["low_rank"] = leaves["u"], leaves["low_rank"]
    return function(leaves["input"], leaves["weight"], target, linear_bias=leaves.get("bias"), **options)


def gradients(outputs, leaves):
    """Gradients of a random weighting of all outputs, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    total = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(total, list(wanted.values())), strict=True))


def assert_close(name, got, want, rtol=1e-10, atol=1e-12):
    assert got.dtype == want.dtype, f"{name}: {got.dtype}, expected {want.dtype}"
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")


def assert_same_gradients(got, want, part, **tolerance):
    assert set(got) == set(want)
    for name, gradient in got.items():
        assert_close(f"gradient of {name}", gradient, of_part(name, want[name], part), **tolerance)


def compare_loss(group, sizes, leaves, target, options, frozen=(), **tolerance):
    """Loss, gradients and statistics in the group against those of one process."""
    part, names = part_of(sizes, group), options.get("return_stats", ())
    whole, mine = fresh(leaves, frozen=frozen), fresh(leaves, part, frozen)
    expected = call(linear_cross_entropy, whole, target, **options)
    if "weight" in options:
        options = options | {"weight": options["weight"][part]}
    found = call(linear_cross_entropy, mine, target, vocab_parallel_group=group, **options)
    if names:
        (expected, their_stats), (found, stats) = expected, found
        for name in names:
            assert not getattr(stats, name).requires_grad
            assert_close(name, getattr(stats, name), getattr(their_stats, name), **tolerance)
    assert_close("loss", found.detach(), expected.detach(), **tolerance)
    assert found.requires_grad == expected.requires_grad
    if found.requires_grad:
        assert_same_gradients(gradients([found], mine), gradients([expected], whole), part, **tolerance)


def same_on_every_rank(value):
    """Whether all ranks have this value."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return all(other == value for other in values)


@contextmanager
def counted_collectives():
    """Count calls of torch.distributed's collectives by kind."""
    counts, originals = Counter(), {}

    def counting(name, function):
        def wrapper(*args, **kwargs):
            operation = [str(x).rpartition(".")[2].lower() for x in args if isinstance(x, dist.ReduceOp.RedOpType)]
            counts[" ".join([name, *operation])] += 1
            return function(*args, **kwargs)

        return wrapper

    for name in dist.distributed_c10d.__all__:
        if name.startswith(("all_", "reduce", "broadcast", "gather", "scatter", "send", "recv", "barrier")):
            originals[name] = getattr(dist, name)
            setattr(dist, name, counting(name, originals[name]))
    try:
        yield counts
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
