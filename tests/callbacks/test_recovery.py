"""The recovery preset brings a run back that has collapsed, as its detector alone tells it to."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from litropy.callbacks.attention_entropy_monitor import AttentionEntropyMonitor
from litropy.callbacks.collapse_detector import CollapseDetector
from litropy.callbacks.learning_rate_backoff import LearningRateBackoff
from litropy.callbacks.qk_clip_weights import has_qk_norm, query_key_rows
from litropy.callbacks.recovery import QUERY_KEY_PARAMETERS, recovery_actions
from litropy.testing import TINY_CAUSAL_LMS, tiny_causal_lm

spec = importlib.util.spec_from_file_location("remedy_runs", Path(__file__).with_name("remedy_runs.py"))
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _no_subnormal_numbers():
    """Attention that is nearly one-hot is full of them, and a CPU is slow at them."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


def collapse(actions, steps=100):
    detector = CollapseDetector(actions=actions)
    callbacks = [AttentionEntropyMonitor(heatmap_every_n_steps=0), detector]
    module, trainer = runs.train(runs.COLLAPSING, callbacks, steps, batch=16)
    return runs.attention_entropy_by_head(module.model), detector, module, trainer


def test_a_collapsed_run_recovers_and_the_learning_rate_alone_is_not_enough():
    entropy, detector, module, trainer = collapse(recovery_actions())
    critical = [alarm for alarm in detector.alarms if alarm.level == 2]
    assert critical
    assert critical[0].step < 60
    assert float(trainer.callback_metrics["train/learning_rate_factor"]) == pytest.approx(0.1)
    # logits are still held, at the limit and one step's growth
    assert float(trainer.callback_metrics["qk_clip/max_logit"]) < 7
    slow, _, other, _ = collapse([LearningRateBackoff(0.1)])
    assert float(slow.mean()) < 0.25
    assert float(entropy.mean()) > 0.7
    assert float(entropy.min()) > 2 * float(slow.min())
    assert runs.end_loss(module) < runs.end_loss(other)


def test_a_healthy_run_is_left_alone():
    with_actions, detector, module, _ = _healthy(recovery_actions())
    assert not [alarm for alarm in detector.alarms if alarm.level == 2]
    plain, _, other, _ = _healthy([])
    assert module.losses == other.losses
    assert torch.equal(with_actions, plain)


def _healthy(actions):
    detector = CollapseDetector(actions=actions)
    module, trainer = runs.train(
        runs.HEALTHY, [AttentionEntropyMonitor(heatmap_every_n_steps=0), detector], 30, batch=4
    )
    return runs.attention_entropy_by_head(module.model), detector, module, trainer


@pytest.mark.parametrize("architecture", sorted(set(TINY_CAUSAL_LMS) - {"mamba", "falcon"}))
def test_moments_of_all_queries_and_keys_are_meant(architecture):
    model = tiny_causal_lm(architecture)
    meant = {id(p) for name, p in model.named_parameters() if re.search(QUERY_KEY_PARAMETERS, name)}
    assert not any(re.search(QUERY_KEY_PARAMETERS, name) for name, _ in model.named_parameters() if "head" in name)
    attention = [
        m for name, m in model.named_modules() if re.search(r"\.(self_attn|attn|attention|self_attention)$", name)
    ]
    heads = model.config.num_attention_heads
    scaled = [
        rows
        for module in attention
        if not has_qk_norm(module) and any(module.children())
        for rows in _rows(module, heads)
    ]
    assert scaled or any(map(has_qk_norm, attention))
    assert all(id(getattr(rows.owner, rows.weight)) in meant for rows in scaled)


def _rows(module, heads):
    # GPT-J and others wrap the module that has the weights
    inner = next((child for name, child in module.named_children() if name == "attention"), module)
    return query_key_rows(inner, heads)


def test_the_order_is_that_of_the_reference():
    actions = recovery_actions(0.2, tau=15.0, level=1)
    assert [type(action).__name__ for action in actions] == ["LearningRateBackoff", "ResetMoments", "QKClip"]
    assert [action.level for action in actions] == [1, 1, 1]
    assert (actions[0].backoff.factor, actions[2].tau) == (0.2, 15.0)
    assert actions[2].alarm_steps == actions[0].backoff.hold_steps == 200
    assert recovery_actions(names=["wq"])[1].names == ["wq"]
    assert [type(action) for action in CollapseDetector(actions="recovery").actions] == list(map(type, actions))


def test_a_model_that_cannot_be_clipped_is_refused_at_once_and_not_at_the_alarm():
    model = tiny_causal_lm("falcon")

    class Falcon(runs.TinyLM):
        def training_step(self, batch, batch_idx):
            return self.model(batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss

    with pytest.raises(ValueError, match="does not know which weights make queries and keys in FalconAttention"):
        runs.train(1e-2, [CollapseDetector(actions=recovery_actions())], 3, module=Falcon(1e-2, model), batch=2)
    with pytest.raises(ValueError, match="`wq` matches no parameter"):
        runs.train(1e-2, [CollapseDetector(actions=recovery_actions(names=["wq"]))], 3, batch=2)
