import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from litropy.recipes.causal_lm import CausalLM, next_token_targets
from litropy.recipes.output_head import find_output_head
from litropy.recipes.patch_causal_lm import patch_causal_lm
from litropy.testing import TINY_CAUSAL_LMS, tiny_causal_lm


def packed_batch(seed=0, vocabulary=101):
    """Two rows of 12 tokens with some labels ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (2, 12), generator=generator)
    labels = ids.clone()
    labels[0, :5] = -100
    labels[1, 7] = -100
    return {"input_ids": ids, "labels": labels}


def relative_error(ours, theirs):
    return float((ours - theirs).detach().norm() / theirs.detach().norm())


@pytest.mark.parametrize("architecture", TINY_CAUSAL_LMS)
def test_loss_and_all_gradients_equal_the_models_own(architecture):
    causal_lm = tiny_causal_lm(architecture).eval()
    batch = packed_batch()
    named = dict(causal_lm.named_parameters())
    theirs = causal_lm(**batch, use_cache=False).loss
    their_gradients = torch.autograd.grad(theirs, list(named.values()), allow_unused=True)
    losses = {
        "wrapped": CausalLM(causal_lm)(batch).loss,
        "patched": patch_causal_lm(causal_lm, in_eval=True)(**batch, use_cache=False).loss,
    }
    for way, ours in losses.items():
        assert relative_error(ours, theirs) < 1e-5, way
        our_gradients = torch.autograd.grad(ours, list(named.values()), allow_unused=True)
        for name, our_gradient, their_gradient in zip(named, our_gradients, their_gradients, strict=True):
            assert (our_gradient is None) == (their_gradient is None), (way, name)
            if our_gradient is not None:
                # the floor is for gradients that are zero but for rounding: those of a key's bias
                error = (our_gradient - their_gradient).norm()
                assert error <= 1e-4 * their_gradient.norm() + 1e-6, (way, name)


@pytest.mark.parametrize(
    ("architecture", "softcap", "scale", "bias"),
    [
        ("llama", None, 1.0, False),
        ("gemma2", 3.0, 1.0, False),
        ("granite", None, 1 / 8, False),
        ("cohere", None, 0.25, False),
        ("falcon_h1", None, 0.5, False),
        ("phi", None, 1.0, True),
        ("gptj", None, 1.0, True),
    ],
)
def test_probe_reads_what_the_model_does_to_its_logits(architecture, softcap, scale, bias):
    causal_lm = tiny_causal_lm(architecture)
    found = find_output_head(causal_lm)
    assert found.softcap == softcap
    assert found.scale == pytest.approx(scale)
    assert (causal_lm.get_submodule(found.head).bias is not None) == bias


def test_probe_leaves_no_trace():
    causal_lm = tiny_causal_lm("llama").train()
    causal_lm.model.layers[0].eval()
    before = {name: value.clone() for name, value in causal_lm.state_dict().items()}
    state = torch.get_rng_state()
    find_output_head(causal_lm)
    assert torch.equal(torch.get_rng_state(), state)
    assert causal_lm.training
    assert not causal_lm.model.layers[0].training
    assert "forward" not in vars(causal_lm.model)
    assert not causal_lm.lm_head._forward_hooks
    assert all(parameter.grad is None for parameter in causal_lm.parameters())
    assert all(torch.equal(value, before[name]) for name, value in causal_lm.state_dict().items())


class ExtraNorm(nn.Module):
    """Stands for a head with a layer before its matrix."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.weight = linear.weight

    def forward(self, hidden):
        return self.linear(F.layer_norm(hidden, hidden.shape[-1:]))


def refuses(causal_lm, words):
    with pytest.raises(ValueError, match=f"LlamaForCausalLM is not supported.*{re.escape(words)}"):
        CausalLM(causal_lm)


def test_wrapped_head_is_refused():
    causal_lm = tiny_causal_lm("llama")
    causal_lm.lm_head = ExtraNorm(causal_lm.lm_head)
    refuses(causal_lm, "ExtraNorm, not a plain nn.Linear")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model, hidden: model.lm_head(hidden * 2), "changes the hidden states before its output head"),
        (lambda model, hidden: model.lm_head(hidden) * 1.5, "changes its logits in an unknown way"),
        (lambda model, hidden: model.lm_head(hidden) + model.lm_head(hidden), "calls its output head 2 times"),
        (lambda model, hidden: hidden @ model.lm_head.weight.T, "calls its output head 0 times"),
    ],
)
def test_unknown_logits_are_refused(monkeypatch, change, words):
    causal_lm = tiny_causal_lm("llama")

    def forward(input_ids, labels=None, **_):
        logits = change(causal_lm, causal_lm.model(input_ids).last_hidden_state)
        return type("Output", (), {"logits": logits, "loss": causal_lm.loss_function(logits, labels, 101)})

    monkeypatch.setattr(causal_lm, "forward", forward)
    refuses(causal_lm, words)


def test_unknown_loss_is_refused():
    causal_lm = tiny_causal_lm("llama")
    causal_lm.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    refuses(causal_lm, "where next-token cross-entropy is")


def test_padding_of_the_vocabulary_is_a_part_of_the_softmax_as_in_the_model():
    causal_lm = tiny_causal_lm("llama", vocab_size=128).eval()
    batch = packed_batch()
    assert relative_error(CausalLM(causal_lm)(batch).loss, causal_lm(**batch).loss) < 1e-5


def test_mixed_precision_matches_the_models_own_loss():
    causal_lm = tiny_causal_lm("qwen3").eval()
    batch = packed_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = CausalLM(causal_lm)(batch).loss, causal_lm(**batch).loss
    assert ours.dtype == torch.float32
    assert relative_error(ours, theirs) < 1e-2


def test_statistics_come_from_the_same_pass():
    causal_lm = tiny_causal_lm("gemma2").eval()
    batch = packed_batch()
    output = CausalLM(causal_lm)(batch, return_stats=("entropy", "argmax"))
    logits = causal_lm(**batch).logits
    targets = next_token_targets(batch["labels"])
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    kept = targets != -100
    assert int(output.num_targets) == int(kept.sum())
    torch.testing.assert_close(output.stats.entropy[kept], entropy[kept], rtol=1e-4, atol=1e-5)
    assert torch.equal(output.stats.argmax[kept], logits.argmax(-1)[kept])


def test_options_of_the_loss():
    causal_lm = tiny_causal_lm("llama").eval()
    batch = packed_batch()
    logits = causal_lm(**batch).logits.flatten(0, 1)
    targets = next_token_targets(batch["labels"]).flatten()
    kept = targets != -100
    smooth = F.cross_entropy(logits, targets, label_smoothing=0.2)
    square = logits.logsumexp(-1)[kept].square().mean()
    model = CausalLM(causal_lm)
    torch.testing.assert_close(model(batch, label_smoothing=0.2, z_loss=0.01).loss, smooth + 0.01 * square)
    total = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(model(batch, num_items=torch.tensor(7.0)).loss, total / 7)


def test_router_loss_is_weighted_by_its_share_of_the_targets():
    causal_lm = tiny_causal_lm("mixtral", router_aux_loss_coef=0.5).eval()
    model, batch = CausalLM(causal_lm), packed_batch()
    plain, full = model(batch, router_loss=False), model(batch)
    router = full.loss - plain.loss
    assert float(router.detach()) > 0.1
    halved = model(batch, num_items=full.num_targets * 2.0).loss
    torch.testing.assert_close(halved, full.loss / 2)


def test_unknown_router_loss_is_refused():
    causal_lm = tiny_causal_lm("qwen3_moe")
    del causal_lm.num_experts
    with pytest.raises(ValueError, match="router loss that is not understood"):
        CausalLM(causal_lm)


def test_batch_without_targets_gives_zero_and_zero_gradients():
    causal_lm = tiny_causal_lm("llama")
    batch = packed_batch()
    output = CausalLM(causal_lm)(batch | {"labels": torch.full_like(batch["labels"], -100)})
    output.loss.backward()
    assert float(output.loss.detach()) == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in causal_lm.parameters())


def test_casting_keeps_buffers_exact():
    model = CausalLM(tiny_causal_lm("llama"))
    frequencies = model.causal_lm.model.rotary_emb.inv_freq.clone()
    model.to(torch.bfloat16)
    assert model.causal_lm.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.causal_lm.model.rotary_emb.inv_freq, frequencies)


def test_state_dict_holds_each_parameter_once():
    causal_lm = tiny_causal_lm("llama")
    assert [f"causal_lm.{name}" for name in causal_lm.state_dict()] == list(CausalLM(causal_lm).state_dict())


def test_no_logits_are_stored():
    vocabulary = 50_000
    causal_lm = tiny_causal_lm("llama", vocab_size=vocabulary, tie_word_embeddings=True)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    ids = torch.randint(vocabulary, (4, 512))
    with Watch():
        CausalLM(causal_lm)({"input_ids": ids, "labels": ids}).loss.backward()
    assert max(sizes) < ids.numel() * vocabulary / 4
