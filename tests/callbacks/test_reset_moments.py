"""ResetMoments: an optimiser goes on as a new one would, for the parameters that were meant."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from litropy.callbacks.reset_moments import ResetMoments, reset_moments

spec = importlib.util.spec_from_file_location("remedy_runs", Path(__file__).with_name("remedy_runs.py"))
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 0.1),
    "fused": lambda p: torch.optim.AdamW(p, 0.1, fused=True, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, 0.1),
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
}


def step(model, optimizer, seed):
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_next_steps_are_those_of_a_new_optimiser(kind):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = OPTIMIZERS[kind](model.parameters())
    for seed in range(5):
        step(model, optimizer, seed)
    fresh = copy.deepcopy(model)
    other = OPTIMIZERS[kind](fresh.parameters())
    assert reset_moments(model, [optimizer]) == 4
    for seed in range(5, 8):
        step(model, optimizer, seed)
        step(fresh, other, seed)
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_only_named_parameters_are_reset():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer, 0)
    kept = {name: optimizer.state[p]["exp_avg"] for name, p in model.named_parameters() if not name.startswith("1")}
    assert reset_moments(model, [optimizer], [r"^1\."]) == 2
    assert [optimizer.state[p]["exp_avg"] is kept[n] for n, p in model.named_parameters() if n in kept] == [True, True]
    assert len(optimizer.state) == 2
    with pytest.raises(ValueError, match="`nothing` matches no parameter"):
        reset_moments(model, [optimizer], ["weight", "nothing"])


def test_an_optimiser_that_cannot_begin_anew_is_refused():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="Adagrad cannot forget"):
        reset_moments(model, [torch.optim.Adagrad(model.parameters())])
    with pytest.raises(ValueError, match="every_n_steps"):
        ResetMoments(every_n_steps=0)


class Ages(runs.Callback):
    """Writes down how many steps the optimiser has counted for a query's and an MLP's weight."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, module, *_):
        layer = module.model.model.decoder.layers[0]
        state = trainer.optimizers[0].state
        self.found.append([int(state[w].get("step", 0)) for w in (layer.self_attn.q_proj.weight, layer.fc1.weight)])


def test_on_an_alarm(tmp_path):
    ages, warning = Ages(), runs.Alarm(0, 1, "logit_growth", 0, 0, "")
    runs.train(1e-2, [ages, runs.Alarms([ResetMoments(["q_proj"])], steps=[2])], 5, batch=2)
    assert ages.found == [[1, 1], [2, 2], [3, 3], [1, 4], [2, 5]]
    ages = Ages()
    runs.train(1e-2, [ages, runs.Alarms([ResetMoments()], [0], warning)], 2, batch=2)
    assert ages.found == [[1, 1], [2, 2]]


def test_every_so_many_steps_under_accumulation():
    ages = Ages()
    runs.train(1e-2, [ResetMoments(["q_proj"], every_n_steps=2), ages], 5, batch=2, accumulate_grad_batches=2)
    assert [age for age, _ in ages.found] == [0, 1, 1, 2, 2, 1, 1, 2, 2, 1]


def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path):
    def callbacks(alarms=()):
        return [ResetMoments(every_n_steps=4), runs.Alarms([ResetMoments(["fc1"])], alarms)]

    whole, _ = runs.train(1e-2, callbacks([3]), 6, batch=2)
    # saved right after the alarm's reset, and right before the scheduled one
    _, trainer = runs.train(1e-2, callbacks([3]), 4, batch=2)
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    resumed, _ = runs.train(1e-2, callbacks(), 6, batch=2, ckpt_path=tmp_path / "four.ckpt")
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
