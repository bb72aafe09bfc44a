"""QKClip: logits of a head shrink by exactly what they should, in every architecture, and nothing else changes."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from litropy.callbacks.attention_capture import _patches, capture_attention
from litropy.callbacks.qk_clip import QKClip
from litropy.callbacks.qk_clip_weights import clip_factors, has_qk_norm, query_key_rows, scale_rows
from litropy.callbacks.sigma_reparam import SigmaReparam
from litropy.testing import TINY_CAUSAL_LMS, tiny_causal_lm

spec = importlib.util.spec_from_file_location("remedy_runs", Path(__file__).with_name("remedy_runs.py"))
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")

IDS = torch.randint(101, (2, 12), generator=torch.Generator().manual_seed(0))
LATENT = {
    "vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6, "intermediate_size": 48,
    "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    "first_k_dense_replace": 2, "max_position_embeddings": 64,
}  # fmt: skip
UNKNOWN = {"mamba", "falcon"}


def tiny(architecture):
    if not architecture.startswith("deepseek"):
        return tiny_causal_lm(architecture).eval()
    rank = 12 if architecture.endswith("low-rank") else None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **LATENT, q_lora_rank=rank)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def first_call(model):
    calls = []
    with capture_attention(model, calls.append, without_gradients=True), torch.no_grad():
        model(IDS)
    return calls[0]


def raw_logits(call):
    """[B, H, Tq, Tk]; of models that add a bias to stored logits only the first key's, to which none is added."""
    if call.source == "softmax":
        return call.bias[..., :1]
    k = call.k.repeat_interleave(call.q.shape[1] // call.k.shape[1], 1)
    return call.q @ k.mT * (call.scale or call.q.shape[-1] ** -0.5)


@pytest.mark.parametrize("architecture", [*sorted(set(TINY_CAUSAL_LMS) - UNKNOWN), "deepseek", "deepseek low-rank"])
def test_logits_follow_in_every_architecture(architecture):
    model = tiny(architecture)
    call = first_call(model)
    before = raw_logits(call)
    factors = torch.tensor([0.25, 1.0, 0.04, 1.0])
    for rows in query_key_rows(call.module, 4):
        scale_rows(rows, factors)
    after = raw_logits(first_call(model))
    expected = factors[:, None, None] * before
    if has_qk_norm(call.module):  # norms undo it, wholly or in part
        assert (after - expected).norm() > 0.3 * (before - expected).norm()
    else:
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "normalises"),
    [("llama", False), ("deepseek low-rank", False), ("qwen3", True), ("olmo2", True), ("gemma3_text", True)],
)
def test_norms_of_queries_and_keys_are_recognised(architecture, normalises):
    assert has_qk_norm(first_call(tiny(architecture)).module) is normalises


@pytest.mark.parametrize("architecture", ["gpt2", "phi3", "gpt_neox", "deepseek"])
def test_values_stay_as_they_are(architecture):
    model = tiny(architecture)
    values, function = [], F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            F, "scaled_dot_product_attention", lambda q, k, v, **o: (values.append(v), function(q, k, v, **o))[1]
        )
        call = first_call(model)
        for rows in query_key_rows(call.module, 4):
            scale_rows(rows, torch.full((4,), 0.1))
        first_call(model)
    assert torch.equal(values[0], values[2])


def test_attention_of_torch():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    nn.init.normal_(layer.self_attn.in_proj_bias)
    x, calls = torch.randn(2, 5, 16), []
    with capture_attention(layer, calls.append):
        layer(x)
        for rows in query_key_rows(calls[0].module, 4):
            scale_rows(rows, torch.tensor([1.0, 0.1, 1.0, 0.5]))
        layer(x)
    expected = torch.tensor([1.0, 0.1, 1.0, 0.5])[:, None, None] * raw_logits(calls[0])
    torch.testing.assert_close(raw_logits(calls[1]), expected, rtol=1e-5, atol=1e-6)


def test_factors_of_odd_logits():
    logits = torch.tensor([-300.0, 0.0, 99.9, 400.0, torch.nan, torch.inf, -torch.inf])
    assert torch.equal(clip_factors(logits, 100.0), torch.tensor([1.0, 1.0, 1.0, 0.25, 1.0, 1.0, 1.0]))


@pytest.mark.parametrize("spoil", ["frozen", "spectral", "unknown", "adapters"])
def test_weights_that_cannot_be_scaled_are_refused(spoil):
    model = tiny("llama")
    attention = model.model.layers[0].self_attn
    message = {"frozen": "frozen", "spectral": "SigmaReparam", "unknown": "It knows separate", "adapters": "It knows"}
    if spoil == "frozen":
        attention.q_proj.requires_grad_(False)
    elif spoil == "spectral":
        SigmaReparam().insert(model)
    elif spoil == "unknown":
        del attention.k_proj
    else:
        attention.q_proj = nn.Sequential(attention.q_proj)
    with pytest.raises(ValueError, match=message[spoil]):
        query_key_rows(attention, 4)


# training


class Still(runs.TinyLM):
    """Learns at the rate 0, so that weights change by clipping alone; keeps what it saw."""

    def __init__(self, model=None, sharp=6.0, seed=0):
        super().__init__(0.0, model=runs.tiny_opt(seed=seed) if model is None else model)
        self.max_logits = []
        if model is None:
            with torch.no_grad():
                for layer in self.model.model.decoder.layers:
                    layer.self_attn.q_proj.weight *= sharp
                    layer.self_attn.k_proj.weight *= sharp

    def on_train_start(self):
        self.capture = capture_attention(self, self.see, recomputations=True)

    @torch.no_grad()
    def see(self, call):
        self.max_logits.append(call.stats().max_raw_logit.amax((0, 2)))

    def on_train_end(self):
        self.capture.close()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class Same(runs.Markov):
    """The same batches over and over."""

    def __init__(self, batch=4, period=1):
        super().__init__(batch)
        self.period = period

    def __getitem__(self, index):
        return super().__getitem__(index % self.period)


def watch(callbacks, steps, data=None, module=None, **options):
    """Largest logits [calls, heads]."""
    module = module or Still()
    _, trainer = runs.train(None, callbacks, steps, module, data=data or Same(), **options)
    return torch.stack(module.max_logits), module, trainer


def test_after_a_step_no_logit_of_the_first_layer_exceeds_the_limit():
    logits, module, trainer = watch([QKClip(tau=20.0)], 2)
    plain = Still()
    first, again = logits[0], logits[2]
    assert first.max() > 40
    torch.testing.assert_close(again, first.clamp(max=20.0))
    # to the last bit where a head was fine
    weight, before = (
        m.model.model.decoder.layers[0].self_attn.q_proj.weight.unflatten(0, (4, -1)) for m in (module, plain)
    )
    factors = (20.0 / first).clamp(max=1.0)
    for ours, old, factor in zip(weight, before, factors, strict=True):
        torch.testing.assert_close(ours, old * factor.sqrt(), rtol=1e-6 if factor < 1 else 0, atol=0)
    assert float(trainer.callback_metrics["qk_clip/max_logit"]) == pytest.approx(float(logits[2:].max()))
    assert float(trainer.callback_metrics["qk_clip/clipped_heads"]) == int((logits[2:] > 20).sum())
    assert not _patches


def test_the_largest_logit_of_all_micro_batches_counts():
    logits, _, _ = watch([QKClip(tau=20.0)], 2, Same(2, period=4), accumulate_grad_batches=4)
    first_layer = logits[::2]
    before, after = first_layer[:4].amax(0), first_layer[4:].amax(0)
    torch.testing.assert_close(after, before.clamp(max=20.0))
    assert not torch.equal(first_layer[0], before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    def checkpointed():
        module = Still()
        module.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            module.model.enable_input_require_grads()
        return module

    clip = QKClip(tau=20.0)
    _, module, _ = watch([clip], 3, Same(2, period=2), module=checkpointed(), accumulate_grad_batches=2)
    _, plain, _ = watch([QKClip(tau=20.0)], 3, Same(2, period=2), accumulate_grad_batches=2)
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_some_rows_are_enough_to_measure():
    logits, _, _ = watch([QKClip(tau=20.0, rows=8)], 3)
    assert 20 < logits[2].max() < 0.7 * logits[0].max()


def test_layers_with_norms_are_left_alone_and_that_is_said_once():
    class Batch:
        def __iter__(self):
            while True:
                yield {"input_ids": IDS % 64}

    class Normed(Still):
        def training_step(self, batch, batch_idx):
            return self.model(batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss

    model = tiny("qwen3").train()
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="layers.0.self_attn and layers like it") as found:
        watch([QKClip(tau=1e-3)], 3, Batch(), Normed(model))
    assert sum("QKClip does nothing" in str(warning.message) for warning in found) == 1
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_that_the_default_is_no_guard_of_entropy_is_said(caplog):
    caplog.set_level("INFO")
    watch([QKClip()], 1)
    assert caplog.text.count("not attention entropy") == 1
    caplog.clear()
    watch([QKClip(tau=10)], 1)
    assert "not attention entropy" not in caplog.text


def test_a_model_without_attention_is_refused():
    class NoAttention(runs.TinyLM):
        def training_step(self, batch, batch_idx):
            return self.model(torch.ones(1, 2)).sum()

    with pytest.raises(ValueError, match="saw no attention in a training step of NoAttention"):
        runs.train(1e-2, [QKClip()], 1, module=NoAttention(1e-2, nn.Linear(2, 2)), batch=2)
    assert not _patches


def test_as_an_action_it_clips_once_an_alarm():
    logits, _, _ = watch([runs.Alarms([QKClip(tau=20.0)], steps=[1])], 5)
    first_layer = logits[::2]
    for step in (1, 2):
        assert torch.equal(first_layer[step], first_layer[0])
    for step in (3, 4):
        torch.testing.assert_close(first_layer[step], first_layer[0].clamp(max=20.0))
    warning = runs.Alarm(0, 1, "logit_growth", 0, 0, "")
    logits, _, _ = watch([runs.Alarms([QKClip(tau=20.0)], [1], warning)], 4)
    assert torch.equal(logits[0], logits[6])
    logits, _, _ = watch([runs.Alarms([QKClip(tau=20.0, level=1)], [1], warning)], 4)
    assert logits[6].max() < 20.01


def test_an_alarm_may_hold_for_several_steps():
    def first_layer(alarm_steps):
        clip = QKClip(tau=20.0, alarm_steps=alarm_steps)
        logits, _, _ = watch([runs.Alarms([clip], steps=[0])], 6, Same(period=2))
        assert not _patches
        return logits[::2].amax(1), clip

    once, _ = first_layer(1)
    twice, clip = first_layer(2)
    # the other batch has larger logits in some head than the one that was clipped by
    assert max(once[2:]) > 20.5
    assert max(twice[3:]) < 20.01
    assert clip.state_dict() == {"steps_left": 0}


def test_an_alarm_that_waits_survives_a_checkpoint(tmp_path):
    alarms = runs.Alarms([QKClip(tau=20.0)], steps=[1])
    _, _, trainer = watch([alarms], 2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed, _, _ = watch([runs.Alarms([QKClip(tau=20.0)], steps=[])], 4, ckpt_path=tmp_path / "two.ckpt")
    whole, _, _ = watch([runs.Alarms([QKClip(tau=20.0)], steps=[1])], 4)
    assert torch.equal(whole[4:], resumed)


def test_compiled_layers_are_clipped_too():
    for clip in ([QKClip(tau=20.0)], [runs.Alarms([QKClip(tau=20.0)], steps=[0])]):
        module = Still()
        for layer in module.model.model.decoder.layers:
            layer.compile(backend="aot_eager")
        runs.train(None, clip, 3, module, data=Same())
        logits = first_layer_logits(module)
        assert 19 < logits.max() < 20.01


def first_layer_logits(module):
    calls = []
    with capture_attention(module, calls.append), torch.compiler.set_stance("force_eager"):
        module.training_step(Same()[0], 0)
    return calls[0].stats().max_raw_logit


def test_a_low_limit_keeps_entropy_where_the_rate_would_collapse_it():
    clipped, _ = runs.train(runs.COLLAPSING, [QKClip(tau=10.0)], 40)
    collapsed, _ = runs.train(runs.COLLAPSING, [], 40)
    ours, theirs = (float(runs.attention_entropy_by_head(m.model).mean()) for m in (clipped, collapsed))
    assert theirs < 0.25
    assert ours > theirs + 0.2
