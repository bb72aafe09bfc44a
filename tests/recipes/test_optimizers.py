import itertools
import math

import pytest
import torch
from torch import nn

from litropy.recipes.optimizers import adamw, decay_groups, learning_rate_factor
from litropy.testing import tiny_causal_lm


def curve(*args, steps=20, **options):
    factor = learning_rate_factor(*args, **options)
    return [factor(step) for step in range(steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warmup_is_linear_and_reaches_the_full_rate(schedule):
    values = curve(schedule, total_steps=20, warmup_steps=4)
    assert values[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_cosine_falls_from_the_warmup_to_the_floor():
    values = curve("cosine", total_steps=20, warmup_steps=4, min_ratio=0.1)
    assert values[12] == pytest.approx(0.1 + 0.9 * 0.5)
    assert values[20] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in itertools.pairwise(values[4:]))


def test_wsd_is_stable_and_then_decays():
    values = curve("wsd", total_steps=20, warmup_steps=2, min_ratio=0.2, decay_share=0.25)
    assert values[2:16] == pytest.approx([1.0] * 14)
    assert values[16] == pytest.approx(1 - 0.8 * math.sqrt(1 / 5))
    assert values[20] == pytest.approx(0.2)


def test_steps_after_the_last_stay_at_the_floor():
    assert learning_rate_factor("cosine", 10, min_ratio=0.3)(50) == pytest.approx(0.3)
    assert learning_rate_factor("wsd", 10, min_ratio=0.3)(50) == pytest.approx(0.3)


def test_warmup_longer_than_the_run_is_just_a_rise():
    assert learning_rate_factor("cosine", 4, warmup_steps=10)(3) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "linear"}, "choose 'cosine', 'wsd' or 'constant'"),
        ({"schedule": "cosine", "total_steps": math.inf}, "set trainer.max_steps"),
        ({"warmup_steps": -1}, "must be at least 0"),
        ({"min_ratio": 1.5}, "from 0 to 1"),
        ({"decay_share": -0.5}, "from 0 to 1"),
    ],
)
def test_bad_schedules_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        learning_rate_factor(**{"schedule": "cosine", "total_steps": 10, **options})


def names_of(model, group):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


def test_only_matrices_decay():
    model = tiny_causal_lm("gpt2")
    decayed, kept = decay_groups([model], 0.1)
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in kept["params"])
    # the head is tied to the embedding and must appear once
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def test_embeddings_can_be_left_out_of_the_decay():
    model = tiny_causal_lm("llama")
    decayed, kept = decay_groups([model], 0.1, decay_embeddings=False)
    assert "model.embed_tokens.weight" in names_of(model, kept)
    assert "lm_head.weight" in names_of(model, decayed)


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    model[0].requires_grad_(False)
    (group,) = decay_groups([model], 0.1)
    assert len(group["params"]) == 1
    with pytest.raises(ValueError, match="nothing to train"):
        adamw(decay_groups([model[0]], 0.1), 1e-3, (0.9, 0.95), 1e-8)


def test_adamw_steps_as_torch_does():
    weights = [nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))]
    ours = adamw([{"params": weights[:1], "weight_decay": 0.5}], 0.1, (0.9, 0.95), 1e-8)
    theirs = torch.optim.AdamW(weights[1:], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5)
    for optimizer, weight in zip((ours, theirs), weights, strict=True):
        weight.grad = torch.arange(9.0).view(3, 3)
        optimizer.step()
    assert ours.defaults["fused"]
    torch.testing.assert_close(weights[0], weights[1])
