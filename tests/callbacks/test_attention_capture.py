"""What a capture sees, against attention weights that the model itself stores, and what it leaves behind: nothing."""

import functools
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from litropy.callbacks.attention_arguments import of_interface
from litropy.callbacks.attention_call import AttentionCall
from litropy.callbacks.attention_capture import attention_modules, capture_attention, report_attention
from litropy.testing import tiny_causal_lm

_MLA = {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
DEEPSEEK = _MLA | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "vocab_size": 101,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

# architecture, options, and implementations besides eager; where the source is not the interface, which one
MODELS = {
    "llama": ({}, ["sdpa"]),
    "qwen3": ({}, ["sdpa"]),
    "gemma2": ({**WINDOW, "attn_logit_softcapping": 2.0}, []),
    "gemma3_text": (WINDOW, ["sdpa"]),
    "mistral": ({"sliding_window": 4}, ["sdpa"]),
    "gpt2": ({}, ["sdpa"]),
    "gpt_neox": ({}, ["sdpa"]),
    "falcon": ({}, ["sdpa"]),
    "mixtral": ({}, ["sdpa"]),
    "qwen3_moe": ({}, ["sdpa"]),
    "gpt_oss": (WINDOW, []),
    "deepseek_v3": ({}, ["sdpa"]),
    "gptj": ({}, []),
    "bloom": ({}, []),
}
SOURCES = {
    ("falcon", "eager"): "softmax",
    ("falcon", "sdpa"): "scaled_dot_product_attention",
    ("gptj", "eager"): "softmax",
    ("bloom", "eager"): "softmax",
}


@functools.cache
def model_of(architecture, implementation):
    if architecture == "deepseek_v3":
        torch.manual_seed(0)
        config = AutoConfig.for_model(architecture, **DEEPSEEK)
        return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    options = MODELS[architecture][0]
    return tiny_causal_lm(architecture, attn_implementation=implementation, **options).eval()


def tokens(batch=2, length=12, seed=0):
    return torch.randint(101, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded():
    ids, mask = tokens(), torch.ones(2, 12, dtype=torch.int64)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def see(model, run, **options):
    """The calls that a capture sees while ``run`` runs, and what it returns."""
    calls = []
    with capture_attention(model, calls.append, **options):
        output = run()
    return calls, output


def entropy_of(weights):
    """Of attention weights as eager attention returns them; what is missing in a row's sum went to a sink."""
    weights = weights.double()
    sink = (1 - weights.sum(-1)).clamp_min(0)
    sink = torch.where(sink > 1e-5, sink, 0)
    return -torch.xlogy(weights, weights).sum(-1) - torch.xlogy(sink, sink)


def is_patched():
    from litropy.callbacks.attention_capture import _patches

    return bool(_patches)


@pytest.mark.parametrize(
    ("architecture", "implementation"), [(name, how) for name, (_, more) in MODELS.items() for how in ("eager", *more)]
)
def test_entropies_of_every_architecture(architecture, implementation):
    model, batch = model_of(architecture, implementation), padded()
    with torch.no_grad():
        plain = model(**batch).logits
        calls, output = see(model, lambda: model(**batch).logits, without_gradients=True)
        attentions = model_of(architecture, "eager")(**batch, output_attentions=True).attentions
    assert torch.equal(plain, output)
    assert not is_patched()
    assert [call.layer for call in calls] == [0, 1]
    real = batch["attention_mask"].bool()
    for call, weights in zip(calls, attentions, strict=True):
        assert call.source == SOURCES.get((architecture, implementation), "interface")
        assert torch.equal(call.padding(torch.arange(12)), ~real)
        stats = call.stats()
        rows = real[:, None].expand_as(stats.entropy)
        torch.testing.assert_close(stats.entropy.double()[rows], entropy_of(weights)[rows], rtol=0, atol=3e-6)
        assert torch.equal(stats.visible_keys[rows], (weights > 0).sum(-1)[rows])
        torch.testing.assert_close(stats.p_max[rows], weights.amax(-1)[rows], rtol=0, atol=3e-6)


def test_statistics_of_some_rows_and_sequences():
    model, batch = model_of("llama", "sdpa"), padded()
    calls, _ = see(model, lambda: model(**batch))
    rows, some = torch.tensor([1, 5, 7]), calls[0]
    whole, part = some.stats(), some.stats(rows, slice(1, 2))
    assert torch.equal(part.entropy, whole.entropy[1:, :, rows])
    assert torch.equal(some.padding(torch.tensor([7, 8]), slice(1, 2)), torch.tensor([[False, True]]))


def test_packed_documents_are_apart():
    model = model_of("llama", "sdpa")
    ids, positions = tokens(1, 10), torch.cat([torch.arange(6), torch.arange(4)])[None]
    calls, _ = see(model, lambda: model(input_ids=ids, position_ids=positions, use_cache=False))
    alone, _ = see(model, lambda: model(input_ids=ids[:, 6:]))
    assert calls[1].stats().visible_keys[0, 0].tolist() == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4]
    torch.testing.assert_close(calls[1].stats().entropy[:, :, 6:], alone[1].stats().entropy)
    assert not calls[1].padding(torch.arange(10)).any()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cross_attention_and_relative_positions(implementation):
    torch.manual_seed(0)
    sizes = {"vocab_size": 101, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    batch = {**padded(), "decoder_input_ids": tokens(2, 5)}
    model.set_attn_implementation("eager")
    output = model(**batch, output_attentions=True)
    weights = [*output.encoder_attentions, *output.decoder_attentions, *output.cross_attentions]
    model.set_attn_implementation(implementation)
    calls, _ = see(model, lambda: model(**batch))
    assert [call.name.rpartition(".")[2] for call in calls] == ["SelfAttention", "SelfAttention", "EncDecAttention"]
    for call, truth in zip(calls, weights, strict=True):
        torch.testing.assert_close(call.stats().entropy.double(), entropy_of(truth), rtol=0, atol=3e-6)
    assert calls[2].padding(torch.arange(5)) is None


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(need_weights):
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    truth = layer(x, x, x, key_padding_mask=padding, average_attn_weights=False)[1]
    calls, _ = see(layer, lambda: layer(x, x, x, key_padding_mask=padding, need_weights=need_weights))
    assert [call.source for call in calls] == ["softmax" if need_weights else "scaled_dot_product_attention"]
    torch.testing.assert_close(calls[0].stats().entropy.double(), entropy_of(truth), rtol=0, atol=2e-6)
    assert torch.equal(calls[0].padding(torch.arange(5)), padding)


def test_transformer_layers_with_and_without_causal_masks():
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    x = torch.randn(3, 5, 8)
    for is_causal in (True, False):
        calls, _ = see(encoder, lambda is_causal=is_causal: encoder(x, mask=mask, is_causal=is_causal))
        assert [call.name for call in calls] == ["layers.0.self_attn", "layers.1.self_attn"]
        assert calls[0].stats().visible_keys[0, 0].tolist() == [1, 2, 3, 4, 5]
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 1)
    calls, _ = see(decoder, lambda: decoder(x, torch.randn(3, 7, 8)))
    assert [call.name for call in calls] == ["layers.0.self_attn", "layers.0.multihead_attn"]
    assert calls[1].stats().visible_keys.unique().tolist() == [7]


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "mask_shape"),
    [((6, 4), (6, 4), (6, 6)), ((3, 6, 4), (3, 5, 4), (3, 6, 5)), ((2, 3, 2, 6, 4), (2, 3, 2, 5, 4), (2, 3, 1, 6, 5))],
)
def test_product_attention_of_any_shape(q_shape, k_shape, mask_shape):
    class Attention(nn.Module):
        def forward(self, q, k, mask):
            return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)

    q, k = torch.randn(q_shape, dtype=torch.float64), torch.randn(k_shape, dtype=torch.float64)
    mask = torch.rand(mask_shape) < 0.7
    mask[..., 0] = True
    model = Attention()
    calls, _ = see(model, lambda: model(q, k, mask))
    weights = (q @ k.mT / 2).masked_fill(~mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(calls[0].stats().entropy.flatten(), entropy_of(weights).flatten(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_keys", [4, 6, 9])
def test_is_causal_begins_at_the_first_key(num_keys):
    class Attention(nn.Module):
        def forward(self, q, k):
            return F.scaled_dot_product_attention(q, k, k, is_causal=True)

    q, k, model = torch.randn(1, 1, 6, 4), torch.randn(1, 1, num_keys, 4), Attention()
    calls, _ = see(model, lambda: model(q, k))
    assert calls[0].stats().visible_keys[0, 0].tolist() == [min(i + 1, num_keys) for i in range(6)]


# flash and flex attention need a GPU to run, but not to be understood


def interface_call(kind, mask, length=6, batch=2, **options):
    module = nn.Identity()
    q, k = torch.randn(batch, 4, length, 8), torch.randn(batch, 2, length, 8)
    found = of_interface(kind, module, q, k, mask, {"is_causal": True, "scaling": 0.3, **options})
    return AttentionCall(module=module, name="", layer=0, source="interface", recomputed=False, **found)


def test_flash_attention_padding_and_window():
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, :2] = 0
    call = interface_call("flash", mask, sliding_window=3)
    assert call.stats().visible_keys[:, 0].tolist() == [[1, 2, 3, 3, 3, 3], [0, 0, 1, 2, 3, 3]]
    assert torch.equal(call.padding(torch.arange(6)), ~mask.bool())
    both = interface_call("flash", None, sliding_window=3, is_causal=False)
    assert both.stats().visible_keys[0, 0].tolist() == [3, 4, 5, 5, 4, 3]


def test_flash_attention_packed_documents():
    cu = torch.tensor([0, 4, 6])
    lengths = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 4, "max_length_k": 4}
    positions = torch.tensor([[0, 1, 2, 3, 0, 1]])
    for options in (lengths, {"position_ids": positions}):
        stats = interface_call("flash", None, batch=1, **options).stats()
        assert stats.visible_keys[0, 0].tolist() == [1, 2, 3, 4, 1, 2]


def test_flex_attention_masks():
    documents = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, -1]])

    def mask_mod(b, h, i, j):
        return (i >= j) & (documents[b, i] == documents[b, j]) & (documents[b, j] >= 0)

    block_mask = create_block_mask(mask_mod, 2, None, 6, 6, device="cpu")
    call = interface_call("flex", block_mask, softcap=2.0)
    assert call.stats().visible_keys[:, 1].tolist() == [[1, 2, 3, 4, 1, 2], [1, 2, 1, 2, 3, 0]]
    rows = torch.tensor([3, 5])
    assert call.stats(rows, slice(1, 2)).visible_keys[:, 0].tolist() == [[2, 0]]
    assert call.padding(rows).tolist() == [[False, False], [False, True]]
    logits = 2 * (0.3 * call.q @ call.k.repeat_interleave(2, 1).mT / 2).tanh()
    weights = logits[0].masked_fill(~(documents[0][:, None] == documents[0]).tril(), -torch.inf).softmax(-1)
    torch.testing.assert_close(call.stats().entropy[0].double(), entropy_of(weights), rtol=0, atol=2e-6)


def test_sinks_that_differ_between_positions_are_refused():
    with pytest.raises(ValueError, match=r"Identity passes sink logits of shape \(2, 4, 6, 1\)"):
        interface_call("eager", None, sinks=torch.zeros(2, 4, 6, 1))


# gradients


def tiny_llama(**options):
    return tiny_causal_lm("llama", **options).train()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, ids = tiny_llama(), tokens()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls, _ = see(model, lambda: model(ids, labels=ids).loss.backward())
    assert [call.layer for call in calls] == ([] if reentrant else [0, 1])
    calls, _ = see(model, lambda: model(ids, labels=ids).loss.backward(), recomputations=True)
    first = [] if reentrant else [(0, False), (1, False)]
    assert [(call.layer, call.recomputed) for call in calls] == [*first, (1, True), (0, True)]


def stored_entropy(call):
    """Sum of the entropies of a causal call, with stored weights."""
    logits = call.scale * call.q @ call.k.repeat_interleave(2, 1).mT
    p = logits.masked_fill(~torch.ones_like(logits, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    return -(p * p.clamp_min(1e-30).log()).sum()


@pytest.mark.parametrize(
    ("checkpointing", "entropy_of_call"),
    [(False, lambda call: call.stats().entropy.sum()), (False, stored_entropy), (True, stored_entropy)],
)
def test_gradients_of_the_entropy(checkpointing, entropy_of_call):
    """A sum of entropies, taken inside the layers, trains the projections as stored attention weights would."""
    ids = tokens()

    def gradients(model):
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    stored = tiny_llama(attn_implementation="eager")
    attentions = stored(ids, output_attentions=True).attentions
    entropies = [-(weights * weights.clamp_min(1e-30).log()).sum() for weights in attentions]
    sum(entropies).backward()

    def add(call):
        entropy = entropy_of_call(call)
        if not call.recomputed:
            found.append(entropy)

    model, found = tiny_llama(), []
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with capture_attention(model, add, recomputations=True):
        last = model(ids).logits.sum() * 0
        sum(found, last).backward()
    torch.testing.assert_close(found, entropies)
    found, truth = gradients(model), gradients(stored)
    assert set(found) >= set(truth)
    for name, gradient in truth.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_generation_evaluation_and_other_models_are_not_seen():
    model, other, ids = tiny_llama(), tiny_llama(), tokens()

    def run():
        model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
        other(ids)
        with torch.no_grad():
            model(ids)

    assert see(model, run)[0] == []
    assert len(see(model, run, without_gradients=True)[0]) == 2 * 3


# what is left behind


def test_captures_may_close_in_any_order():
    model, ids, seen = tiny_llama(), tokens(1, 4), []
    before = F.scaled_dot_product_attention, AttentionInterface.get_interface, torch.Tensor.softmax
    first = capture_attention(model, lambda _: seen.append("first"))
    second = capture_attention(model, lambda _: seen.append("second"))
    model(ids)
    first.close()
    first.close()
    model(ids)
    second.close()
    model(ids)
    assert seen == ["first", "second"] * 2 + ["second"] * 2
    assert (F.scaled_dot_product_attention, AttentionInterface.get_interface, torch.Tensor.softmax) == before
    assert "softmax" not in vars(torch.Tensor)
    assert "__getitem__" not in vars(AttentionInterface)
    with second:
        second.open()
        model(ids)
    assert seen[6:] == ["second"] * 2


def test_an_error_closes_the_capture():
    def fail(call):
        raise RuntimeError(call.name)

    model = tiny_llama()
    with pytest.raises(RuntimeError, match=r"model\.layers\.0\.self_attn"), capture_attention(model, fail):
        model(tokens())
    assert not is_patched()
    assert model(tokens()).logits.isfinite().all()


def test_old_style_code_that_indexes_the_interface(tmp_path, monkeypatch):
    """Files of models on the hub look functions up by key and import them by name."""
    (tmp_path / "hub_model.py").write_text(
        "from torch import nn\n"
        "from torch.nn.functional import scaled_dot_product_attention as attend\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS\n"
        "class Layer(nn.Module):\n"
        "    def forward(self, q):\n"
        "        attend(q, q, q)\n"
        "        return ALL_ATTENTION_FUNCTIONS['sdpa'](self, q, q, q, attention_mask=None, scaling=0.5)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import hub_model

    layer, q = hub_model.Layer(), torch.randn(1, 2, 3, 4)
    calls, _ = see(layer, lambda: layer(q))
    assert [call.source for call in calls] == ["scaled_dot_product_attention", "interface"]
    assert [call.causal for call in calls] == [False, True]
    assert hub_model.attend is F.scaled_dot_product_attention
    del sys.modules["hub_model"]


def test_flex_attention_stays_compiled_in_a_model_that_runs_uncompiled(monkeypatch):
    stances = []

    def flex(module, query, key, value, attention_mask, **options):
        stances.append(torch._dynamo.eval_frame._stance.stance)
        return query, None

    class Layer(nn.Module):
        def forward(self, q):
            return AttentionInterface().get_interface("some_flex", None)(self, q, q, q, None)[0]

    monkeypatch.setitem(AttentionInterface._global_mapping, "some_flex", flex)
    layer, q = Layer(), torch.randn(1, 2, 3, 4)
    with torch.compiler.set_stance("force_eager"):
        calls, _ = see(layer, lambda: layer(q))
        layer(q)
    assert stances == ["default", "force_eager"]
    assert calls[0].stats().visible_keys.unique().tolist() == [3]


def test_attention_is_reported_by_hand():
    class Kernel(nn.Module):
        def forward(self, x):
            report_attention(self, x, x, scale=1.0, causal=True)
            return x * 2

    model, x = Kernel(), torch.randn(1, 2, 3, 4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), x * 2)
    calls, _ = see(model, lambda: model(x))
    assert [(call.source, call.causal, call.scale) for call in calls] == [("reported", True, 1.0)]
    assert calls[0].stats().visible_keys[0, 0].tolist() == [1, 2, 3]


def test_compiled_code_is_seen_while_a_capture_stays_open():
    model, ids, seen, counter = tiny_llama(num_hidden_layers=1).eval(), tokens(), [], CompileCounter()
    plain = model(ids).logits
    with capture_attention(model, lambda call: seen.append(call.layer), sources=("interface",)):
        compiled, frames = torch.compile(model, backend=counter), []
        for _ in range(3):
            torch.testing.assert_close(compiled(ids).logits, plain)
            frames.append(counter.frame_count)
    assert seen == [0] * 3
    assert frames[0] == frames[2] > 0
    torch.testing.assert_close(compiled(ids).logits, plain)
    assert seen == [0] * 3


def test_unknown_sources():
    with pytest.raises(ValueError, match="`sources` holds sdpa; choose from interface, scaled_dot"):
        capture_attention(nn.Linear(2, 2), print, sources=["sdpa"])


def test_modules_that_look_like_attention():
    assert attention_modules(tiny_llama()) == {f"model.layers.{i}.self_attn": "LlamaAttention" for i in range(2)}
    assert attention_modules(nn.Linear(2, 2)) == {}
    assert isinstance(tiny_llama(), LlamaForCausalLM)
