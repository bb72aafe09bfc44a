"""SigmaReparam: the same function at first, its spectral norms a parameter, and plain weights at the end."""

import copy
import importlib.util
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from litropy.callbacks.collapse_detector import CollapseDetector
from litropy.callbacks.sigma_reparam import SigmaReparam, linear_weights
from litropy.callbacks.sigma_reparam_weights import (
    SpectralGain,
    fold,
    folded_state_dict,
    reparametrize,
    spectral_gains,
)
from litropy.recipes import LanguageModel
from litropy.testing import tiny_causal_lm, tiny_config

spec = importlib.util.spec_from_file_location("remedy_runs", Path(__file__).with_name("remedy_runs.py"))
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")
IDS = torch.arange(48).reshape(2, 24) % 50


def norm(weight):
    return torch.linalg.matrix_norm(weight.double(), 2)


def tiny(architecture="llama", **keys):
    return tiny_causal_lm(architecture, **keys).eval()


# the parametrisation


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    scale=st.sampled_from([1e-9, 1e-3, 1.0, 1e9]),
    rank=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_the_norm_is_found_at_once(rows, columns, scale, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    weight = scale * left @ right
    spectral = SpectralGain(weight)
    assert spectral.gain.item() == pytest.approx(float(norm(weight)), rel=1e-4)
    torch.testing.assert_close(spectral(weight), weight, rtol=1e-6, atol=0)


def test_gradients_are_those_of_the_quotient():
    weight = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    spectral = SpectralGain(weight)
    spectral.gain.data.mul_(1.7)
    names = dict(spectral.named_parameters())

    def scaled(weight, gain):
        return torch.func.functional_call(spectral, {"gain": gain}, (weight,))

    assert torch.autograd.gradcheck(scaled, (weight, names["gain"]))
    cotangent = torch.randn(5, 7, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(spectral(weight), weight, cotangent)
    # the formula with both singular vectors, and that scaling W changes nothing
    u, s, v = torch.linalg.svd(weight.detach())
    whole = spectral.gain / s[0] * (cotangent - (cotangent * weight).sum() / s[0] * torch.outer(u[:, 0], v[0]))
    torch.testing.assert_close(gradient, whole.detach(), rtol=1e-6, atol=1e-8)
    assert (gradient * weight).sum().item() == pytest.approx(0, abs=1e-9)


def test_one_step_a_step_follows_a_drifting_matrix():
    weight = torch.randn(64, 48)
    spectral = SpectralGain(weight)
    for _ in range(50):
        weight = weight + 0.02 * torch.randn(64, 48)
        spectral.advance(weight)
        assert float(norm(spectral(weight).detach())) == pytest.approx(spectral.gain.item(), rel=0.02)
    for _ in range(200):
        spectral.advance(weight)
    assert float(norm(spectral(weight).detach())) == pytest.approx(spectral.gain.item(), rel=1e-4)


def test_half_precision_keeps_the_vector_exact():
    layer = nn.Linear(64, 64, bias=False)
    before = layer.weight.detach().clone()
    reparametrize({"weight": (layer, "weight")})
    (_, holder, spectral), *_ = spectral_gains(layer.bfloat16())
    assert holder.original.dtype == spectral.gain.dtype == layer.weight.dtype == torch.bfloat16
    assert spectral.right.dtype == torch.float32
    assert float(torch.linalg.vector_norm(spectral.right)) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(layer.weight.float(), before, rtol=0.02, atol=1e-3)
    # autocast would form the norm in half precision
    full = nn.Linear(64, 64, bias=False)
    reparametrize({"weight": (full, "weight")})
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(full.weight, full.parametrizations.weight.original, rtol=1e-6, atol=0)


# a model


@pytest.mark.parametrize(("architecture", "weights"), [("llama", 14), ("gpt2", 8)])
def test_the_model_stays_the_same(architecture, weights):
    model = tiny(architecture).double()
    before = model(IDS).logits
    SigmaReparam().insert(model)
    assert len(list(spectral_gains(model))) == weights
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-12, atol=1e-14)
    SigmaReparam().insert(model)  # again changes nothing
    assert len(list(spectral_gains(model))) == weights


def disturb(model):
    """As if it had been trained: gains and matrices have moved, the vectors lag behind."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_folding_gives_a_plain_model_that_computes_the_same(architecture, tmp_path):
    model = tiny(architecture)
    plain_names = list(model.state_dict())
    SigmaReparam().insert(model)
    disturb(model)
    after, state = model(IDS).logits.detach(), folded_state_dict(model.state_dict())
    assert sorted(state) == sorted(plain_names)
    SigmaReparam.fold(model)
    assert sorted(model.state_dict()) == sorted(plain_names)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, state[name]), name
    torch.testing.assert_close(model(IDS).logits, after)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, after)


def test_torch_compile_sees_no_break():
    model = tiny()
    layer = model.model.layers[0].mlp
    SigmaReparam().insert(model)
    disturb(model)
    rows = torch.randn(3, layer.gate_proj.in_features)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        ours = torch.autograd.grad(compiled(rows).sum(), list(layer.parameters()))
        theirs = torch.autograd.grad(layer(rows).sum(), list(layer.parameters()))
        torch.testing.assert_close(ours, theirs)
        for _, holder, spectral in spectral_gains(layer):  # a changed vector must be seen
            spectral.advance(holder.original)


def test_attention_of_torch_is_covered():
    layers = nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)]).double().eval()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    before = layers[0](x)
    SigmaReparam().insert(layers)
    names = {name for name, _, _ in spectral_gains(layers)}
    assert names == {
        f"0.{x}" for x in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    }
    torch.testing.assert_close(layers[0](x), before)
    disturb(layers)
    changed = layers[0].self_attn.in_proj_weight
    assert float(norm(changed.detach())) == pytest.approx(
        layers[0].self_attn.parametrizations.in_proj_weight[0].gain.item(), rel=0.1
    )


def test_embeddings_heads_and_frozen_weights_are_left_alone():
    model = tiny()
    names = set(linear_weights(model))
    assert "lm_head.weight" not in names
    assert {name.rpartition(".layers.")[2][2:] for name in names} == {
        f"{part}.weight"
        for part in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        )
    }  # fmt: skip
    model.model.layers[0].requires_grad_(False)
    assert all(".layers.1." in name for name in linear_weights(model))
    assert list(linear_weights(model, ["lm_head"])) == ["lm_head.weight"]
    assert len(linear_weights(model, exclude=["mlp", "o_proj"])) == 3
    with pytest.raises(ValueError, match="`nothing` matches no linear layer"):
        linear_weights(model, ["nothing", "mlp"])
    with pytest.raises(ValueError, match="no trainable linear layer in OPTForCausalLM"):
        linear_weights(runs.tiny_opt().requires_grad_(False))
    with pytest.raises(ValueError, match="no trainable linear layer"):
        linear_weights(tiny(tie_word_embeddings=True), ["lm_head"])


def test_a_matrix_of_zeros_is_refused_by_name():
    model = tiny()
    nn.init.zeros_(model.model.layers[1].mlp.down_proj.weight)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight.*norm is 0.*`exclude`"):
        SigmaReparam().insert(model)


# training


def states(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_the_iteration_advances_once_an_optimiser_step(monkeypatch):
    calls = []
    advance = SpectralGain.advance
    monkeypatch.setattr(SpectralGain, "advance", lambda self, weight: calls.append(advance(self, weight)))
    runs.train(1e-2, [SigmaReparam()], 3, accumulate_grad_batches=4, batch=2)
    assert len(calls) == 3 * len(linear_weights(runs.tiny_opt()))


def test_gradient_checkpointing_recomputes_the_same():
    model = runs.tiny_opt().double()
    SigmaReparam().insert(model)
    disturb(model)
    block, x = model.model.decoder.layers[0], torch.randn(2, 6, runs.D, dtype=torch.float64)
    found = []
    for call in (block, lambda rows: checkpoint(block, rows, use_reentrant=False)):
        output = call(x)
        output = output[0] if isinstance(output, tuple) else output
        found.append(torch.autograd.grad(output.square().sum(), list(block.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path):
    whole, _ = runs.train(1e-2, [SigmaReparam()], 6, batch=2)
    save = ModelCheckpoint(tmp_path, "three", every_n_train_steps=3, save_top_k=-1)
    runs.train(1e-2, [save, SigmaReparam()], 3, batch=2, enable_checkpointing=True)
    resumed, _ = runs.train(1e-2, [SigmaReparam()], 6, batch=2, ckpt_path=tmp_path / "three.ckpt")
    assert whole.losses[3:] == resumed.losses
    for name, value in states(whole).items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_model_built_late_and_evaluation_are_covered(tmp_path):
    class Late(runs.TinyLM):
        def __init__(self):
            super().__init__(1e-2, model=nn.Identity())

        def configure_model(self):
            if isinstance(self.model, nn.Identity):
                self.model = runs.tiny_opt()

        def validation_step(self, batch, batch_idx):
            self.training_step(batch, batch_idx)

    module, trainer = runs.train(1e-2, [SigmaReparam()], 2, module=Late(), batch=2)
    assert any(spectral_gains(module))
    assert "configure_model" not in vars(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh = Late()
    validator = runs.make_trainer([SigmaReparam()], 2, limit_val_batches=1)
    validator.validate(fresh, runs.Markov(2), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    for name, value in states(module).items():
        assert torch.equal(value, fresh.state_dict()[name]), name


def test_a_language_model_of_ours_is_covered():
    batch = {"input_ids": IDS, "labels": IDS}
    module = LanguageModel(config=tiny_config("llama"), learning_rate=1e-2, pad_vocab_to=1)
    trainer = runs.make_trainer([SigmaReparam()], 2)
    trainer.fit(module, torch.utils.data.DataLoader([batch, batch], batch_size=None))
    assert len(list(spectral_gains(module))) == 14
    state = folded_state_dict(module.causal_lm.state_dict())
    tiny().load_state_dict(state)


def test_a_language_model_of_ours_is_saved_as_a_plain_one(tmp_path):
    batch = {"input_ids": IDS, "labels": IDS}
    module = LanguageModel(config=tiny_config("llama"), learning_rate=1e-2, pad_vocab_to=1)
    trainer = runs.make_trainer([SigmaReparam()], 2)
    trainer.fit(module, torch.utils.data.DataLoader([batch, batch], batch_size=None))
    module.save_pretrained(tmp_path / "folder")
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    again = LanguageModel.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=False).causal_lm
    with torch.no_grad():
        expected = module.causal_lm.eval()(IDS).logits
        for model in (loaded, again):
            torch.testing.assert_close(model.eval()(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_what_comes_too_late_is_refused():
    class AddLate(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            trainer.callbacks.append(SigmaReparam())

    with pytest.raises(ValueError, match="before training begins"):
        runs.train(1e-2, [AddLate()], 3, batch=2)

    class EarlyOptimizer(runs.TinyLM):
        def __init__(self):
            super().__init__(1e-2)
            self.adam = super().configure_optimizers()

        def configure_optimizers(self):
            return self.adam

    with pytest.raises(ValueError, match=r"does not train the gain of `model\.model\.decoder\.layers\.0"):
        runs.train(1e-2, [SigmaReparam()], 3, module=EarlyOptimizer(), batch=2)


def test_what_flattens_matrices_is_refused():
    class Stub:
        strategy = FSDPStrategy.__new__(FSDPStrategy)
        callbacks = ()

    with pytest.raises(ValueError, match="ModelParallelStrategy"):
        SigmaReparam().setup(Stub(), runs.TinyLM(1e-2), "fit")


def test_it_is_no_remedy_for_an_alarm():
    with pytest.raises(ValueError, match="SigmaReparam, which has no `act"):
        CollapseDetector(actions=[SigmaReparam()])


def test_the_rate_at_which_a_model_collapses_trains_as_well_as_a_healthy_one():
    healthy, _ = runs.train(runs.HEALTHY, [], 60)
    collapsed, _ = runs.train(runs.COLLAPSING, [], 60)
    module, _ = runs.train(runs.COLLAPSING, [SigmaReparam()], 60)
    assert float(runs.attention_entropy_by_head(collapsed.model).mean()) < 0.25
    assert float(runs.attention_entropy_by_head(module.model).min()) > 0.9
    assert runs.end_loss(module) < runs.end_loss(healthy) < runs.end_loss(collapsed) - 0.3
    plain = copy.deepcopy(module)
    fold(plain)
    batch = runs.Markov()[500]
    torch.testing.assert_close(plain.training_step(batch, 0), module.training_step(batch, 0))
