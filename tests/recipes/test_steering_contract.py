"""What every method keeps: one update on any micro-batches and ranks, true gradients, and a state that resumes."""

from dataclasses import replace
from pathlib import Path

import pytest
import rlvr_problems as problems
import steering_cases as cases
import torch
from gloo_ranks import launch

from litropy.losses import HeadStats
from litropy.recipes import steering
from litropy.recipes.rlvr_update import cotangents
from litropy.recipes.steering.batch import UpdateBatch
from litropy.recipes.steering.objective import objective
from litropy.recipes.steering.sampler import Sampler
from litropy.recipes.steering.slots import Component, DataSelection

WORKER = Path(cases.__file__).with_name("steering_worker.py")


@pytest.fixture(scope="module")
def policy():
    return problems.policy()


@pytest.fixture(scope="module")
def updates(policy):
    """Each method's update at a micro-batch size, computed once."""
    known = {}

    def find(name, size):
        if (name, size) not in known:
            made = cases.methods(name)
            rollouts = cases.near_policy(policy, problems.rollouts(3, 3), made)
            known[name, size] = cases.gradients(policy, made, rollouts, size)
        return known[name, size]

    return find


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launch(WORKER, folder)
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(2)]


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_change_nothing(updates, name, size):
    gradient, found, _ = updates(name, size)
    whole, reference, _ = updates(name, 8)
    assert torch.equal(found.kept, reference.kept)
    torch.testing.assert_close(found.weight, reference.weight, rtol=1e-5, atol=1e-6)
    assert whole.norm() > 1e-4, "an update without a gradient proves nothing"
    assert relative(gradient, whole) < 1e-6


@pytest.mark.parametrize("name", cases.CASES)
def test_ranks_change_nothing(updates, ranks, name):
    gradient, found, _ = updates(name, 8)
    for rank in ranks:
        assert torch.equal(rank[name]["kept"], found.kept)
        assert relative(rank[name]["gradient"], gradient) < 1e-6
    assert torch.equal(ranks[0][name]["loss"], ranks[1][name]["loss"])


@pytest.mark.parametrize("name", cases.SMOOTH)
def test_gradients_are_the_slopes_of_the_loss(name):
    made, rollouts = cases.methods(name), problems.rollouts(2, 3, width=4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    shape = rollouts.mask.shape
    logprob = rollouts.stats.logprob + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    entropy = torch.rand(shape, generator=generator, dtype=torch.float64)
    advantage = made.advantages(rollouts)

    def loss(logprob, entropy):
        return objective(made, UpdateBatch(rollouts, advantage, HeadStats(logprob=logprob, entropy=entropy))).loss

    inputs = (logprob.requires_grad_(), entropy.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs, atol=1e-6)


@pytest.mark.parametrize("name", cases.CASES)
def test_state_resumes(policy, tmp_path, name):
    made, again = cases.methods(name), cases.methods(name)
    rollouts = cases.near_policy(policy, problems.rollouts(2, 3), made)
    batch = UpdateBatch(rollouts, made.advantages(rollouts), rollouts.stats).detached()

    def moved(step):  # entropy and log-probabilities that change from step to step
        values = {k: v * (1 + 0.1 * step) for k, v in vars(batch.current).items() if v is not None}
        return replace(batch, current=HeadStats(**values))

    for step in range(3):
        cotangents(made, moved(step))
        for _, component in made.named():
            component.after_step(moved(step))
    torch.save({place: component.state_dict() for place, component in made.named()}, tmp_path / "state.pt")
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    for place, component in again.named():
        component.load_state_dict(states[place])
    (ours, slopes), (theirs, expected) = (cotangents(m, moved(3)) for m in (again, made))
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.kept, theirs.kept)
    assert all(torch.equal(slopes[key], expected[key]) for key in expected)


def test_every_method_has_a_case():
    """A method that is exported without a line in steering_cases.py is not under contract."""
    used = set()

    def look(value):
        if isinstance(value, Component):
            used.add(type(value))
            for inner in vars(value).values():
                look(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                look(inner)

    for name in cases.CASES:
        for _, component in cases.methods(name).named():
            look(component)
    exported = {getattr(steering, name) for name in steering.__all__}
    elsewhere = (Sampler, DataSelection)  # they act before the update
    assert not {kind for kind in exported - used if not issubclass(kind, elsewhere)}
