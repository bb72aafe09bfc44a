from contextlib import nullcontext

import peft
import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from litropy.huggingface import patch_causal_lm, unpatch_causal_lm
from litropy.recipes.causal_lm import CausalLM
from litropy.recipes.lora_head import active_head
from litropy.recipes.output_head import find_output_head
from litropy.testing import tiny_causal_lm


def packed_batch():
    ids = torch.randint(101, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels}


def adapted(architecture="llama", dtype=torch.float32, targets=("lm_head",), **options):
    """A tiny model whose head has a LoRA adapter that changes its logits a lot."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM", init_lora_weights=False, **options
    )
    causal_lm = tiny_causal_lm(architecture).to(dtype)
    return peft.get_peft_model(causal_lm, config)


def with_second_adapter(model):
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False, use_rslora=True
    )
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    return model


def loss_and_gradients(model, compute):
    """With the same random state each time, for dropout."""
    torch.manual_seed(2)
    loss = compute()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True) if loss.requires_grad else []
    return loss.detach(), dict(zip(named, gradients, strict=False))


def compare(model, tolerance=1e-5):
    """Loss and gradients of both ways without logits against the PEFT model's own; gives the loss."""
    batch = packed_batch()
    loss, gradients = loss_and_gradients(model, lambda: model(**batch).loss)
    wrapped = CausalLM(model)
    results = {"wrapped": loss_and_gradients(model, lambda: wrapped(batch).loss)}
    patch_causal_lm(model, in_eval=True)
    assert model(**batch).logits is None
    results["patched"] = loss_and_gradients(model, lambda: model(**batch).loss)
    unpatch_causal_lm(model)
    for way, (our_loss, our_gradients) in results.items():
        torch.testing.assert_close(our_loss, loss, rtol=tolerance, atol=tolerance, msg=lambda text, way=way: way + text)
        assert our_gradients.keys() == gradients.keys()
        for name, theirs in gradients.items():
            ours = our_gradients[name]
            assert (ours is None) == (theirs is None), (way, name)
            if theirs is not None:
                assert (ours - theirs).norm() <= 10 * tolerance * theirs.norm() + 1e-6, (way, name)
    return loss


def own_loss(model):
    return model(**packed_batch()).loss.detach()


ARCHITECTURES = ["llama", "gpt2", "gemma2", "granite", "phi"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_dropout": 0.3},
        {"lora_bias": True},
        {"targets": ("lm_head", "embed_tokens", "wte"), "lora_dropout": 0.1},
    ],
    ids=["plain", "rslora, dropout", "bias", "embedding too"],
)
def test_loss_and_gradients_equal_those_of_the_peft_model(architecture, options):
    model = adapted(architecture, **options).train()
    loss = compare(model)
    assert abs(loss - own_loss(tiny_causal_lm(architecture).train())) > 0.01, "the adapter changes nothing"
    A = model.get_base_model().lm_head.lora_A["default"].weight
    torch.manual_seed(2)
    patch_causal_lm(model)(**packed_batch()).loss.backward()
    assert float(A.grad.norm()) > 0


def test_adapters_without_a_peft_model():
    causal_lm = tiny_causal_lm("llama")
    causal_lm.add_adapter(peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    assert len(active_head(causal_lm.lm_head).adapters) == 1
    compare(causal_lm.train())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_several_active_adapters(architecture):
    model = with_second_adapter(adapted(architecture)).train()
    assert len(active_head(model.get_base_model().lm_head).adapters) == 2
    both = compare(model)
    model.set_adapter("second")
    one = compare(model)
    assert abs(both - one) > 0.01


def test_adapters_are_read_anew_in_every_step():
    model = with_second_adapter(adapted()).eval()
    batch = packed_batch()
    wrapped = CausalLM(model)
    patch_causal_lm(model, in_eval=True)

    def check():
        unpatched = loss_without_patch(model)
        torch.testing.assert_close(model(**batch).loss, unpatched)
        torch.testing.assert_close(wrapped(batch).loss, unpatched)
        return float(unpatched.detach())

    def loss_without_patch(model):
        unpatch_causal_lm(model)
        loss = model(**batch).loss
        patch_causal_lm(model, in_eval=True)
        return loss

    seen = [check()]
    for name in ("default", "second"):
        model.set_adapter(name)
        seen.append(check())
    with model.disable_adapter():
        seen.append(check())
    assert seen[-1] == pytest.approx(float(own_loss(tiny_causal_lm("llama").eval())), rel=1e-5)
    assert len({round(loss, 3) for loss in seen}) == 4


def test_merged_adapters():
    model = adapted(lora_dropout=0.5).eval()
    separate = own_loss(model)
    model.merge_adapter()
    head = model.get_base_model().lm_head
    assert head.merged
    assert not active_head(head).adapters
    torch.testing.assert_close(compare(model), separate)
    batch = packed_batch()
    plain = own_loss(tiny_causal_lm("llama").eval())
    with model.disable_adapter():  # takes the adapter out of the weight again, as the layer's own forward does
        torch.testing.assert_close(CausalLM(model)(batch).loss.detach(), plain)
        assert not head.merged
    model.merge_adapter()
    patch_causal_lm(model, in_eval=True)
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch).loss.detach(), plain)
    unpatch_causal_lm(model)
    compare(model)
    compare(model.merge_and_unload())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_modules_to_save(architecture):
    config = peft.LoraConfig(
        target_modules=["q_proj", "c_attn"], modules_to_save=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = peft.get_peft_model(tiny_causal_lm(architecture), config).train()
    head = model.get_base_model().lm_head
    with torch.no_grad():
        head.modules_to_save["default"].weight.mul_(0.5)
    trained = compare(model)
    assert active_head(head).linear is head.modules_to_save["default"]
    batch = packed_batch()
    patch_causal_lm(model)(**batch).loss.backward()
    assert head.modules_to_save["default"].weight.grad is not None
    assert head.original_module.weight.grad is None
    unpatch_causal_lm(model)
    with model.disable_adapter():
        original = compare(model)
    assert abs(original - trained) > 0.01
    without = peft.LoraConfig(target_modules=["q_proj", "c_attn"], task_type="CAUSAL_LM")
    model.add_adapter("without", without)
    model.set_adapter("without")
    torch.testing.assert_close(compare(model), original)


@pytest.mark.parametrize("precision", ["bf16 base", "autocast"])
def test_mixed_precision(precision):
    half = precision == "bf16 base"
    model = adapted(dtype=torch.bfloat16 if half else torch.float32).train()
    assert model.get_base_model().lm_head.lora_A["default"].weight.dtype == torch.float32
    with nullcontext() if half else torch.autocast("cpu", dtype=torch.bfloat16):
        compare(model, tolerance=1e-2)


def test_padded_vocabulary(monkeypatch):
    model = adapted(lora_bias=True).train()
    causal_lm = model.get_base_model()

    def forward(input_ids, labels=None, **_):
        logits = causal_lm.lm_head(causal_lm.model(input_ids).last_hidden_state)[..., :101]
        loss = None if labels is None else causal_lm.loss_function(logits, labels, 101)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    padded = nn.Linear(32, 128, bias=False)
    lora = causal_lm.lm_head
    padded.weight.data[:101] = lora.base_layer.weight.data
    padded.weight.requires_grad_(False)
    lora.base_layer, lora.lora_B["default"] = padded, nn.Linear(4, 128)
    monkeypatch.setattr(causal_lm, "forward", forward)
    assert find_output_head(model).num_logits == 101
    compare(model)


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not function.is_view:
                self.shapes.append(tuple(tensor.shape))
        return result


def test_neither_logits_nor_a_gradient_of_the_frozen_weight_are_stored():
    torch.manual_seed(0)
    vocabulary = 50_000
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(tiny_causal_lm("llama", vocab_size=vocabulary), config).train()
    patch_causal_lm(model)
    ids = torch.randint(vocabulary, (4, 512))
    with Watch() as watch:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert (vocabulary, 32) not in watch.shapes
    assert (vocabulary, 4) in watch.shapes  # the gradient of B, so the watch sees gradients
    sizes = [torch.Size(shape).numel() for shape in watch.shapes]
    assert max(sizes) < ids.numel() * vocabulary / 4
    head = model.get_base_model().lm_head
    assert head.base_layer.weight.grad is None
    assert head.lora_A["default"].weight.grad.abs().sum() > 0


def test_compiles_without_graph_breaks():
    model = adapted().train()
    theirs = loss_and_gradients(model, lambda: model(**packed_batch()).loss)
    inner = patch_causal_lm(model).get_base_model()
    compiled = torch.compile(inner, fullgraph=True, backend="aot_eager")
    ours = loss_and_gradients(model, lambda: compiled(**packed_batch(), use_cache=False).loss)
    torch.testing.assert_close(ours, theirs)


def refused(model, words, ways=(CausalLM, patch_causal_lm)):
    for way in ways:
        with pytest.raises(ValueError, match=words) as caught:
            way(model)
        assert "LlamaForCausalLM is not supported" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: peft.LoHaConfig(target_modules=["lm_head"]), r"peft\.tuners\.loha\.layer\.Linear"),
        (lambda: peft.VeraConfig(target_modules=["lm_head"]), r"peft\.tuners\.vera\.layer\.Linear"),
        (
            lambda: peft.AdaLoraConfig(target_modules=["lm_head"], total_step=10),
            r"peft\.tuners\.adalora\.layer\.SVDLinear",
        ),
        (
            lambda: peft.LoraConfig(target_modules=["lm_head"], use_dora=True),
            r"the adapter 'default' of its output head is a peft\.tuners\.lora\.variants\.DoraLinearVariant",
        ),
        (
            lambda: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": [1, 2]}),
            r"peft\.utils\.other\.TrainableTokensWrapper",
        ),
    ],
    ids=["loha", "vera", "adalora", "dora", "trainable tokens"],
)
def test_other_adapters_of_the_head_are_refused(config, words):
    model = peft.get_peft_model(tiny_causal_lm("llama"), config())
    refused(model.get_base_model(), words + ".*train with the model's own loss")
    with pytest.raises(ValueError, match=words):
        patch_causal_lm(model)


def test_other_adapters_elsewhere_are_none_of_our_business():
    model = peft.get_peft_model(
        tiny_causal_lm("llama"), peft.LoHaConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    theirs = own_loss(model)
    torch.testing.assert_close(patch_causal_lm(model, in_eval=True)(**packed_batch()).loss.detach(), theirs)
    torch.testing.assert_close(
        CausalLM(unpatch_causal_lm(model).get_base_model())(packed_batch()).loss.detach(), theirs
    )


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PromptTuningConfig"),
        (lambda: peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), "LoHaConfig"),
        (
            lambda: peft.LoraConfig(
                task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[3], init_lora_weights=False
            ),
            "LoraConfig",
        ),
    ],
    ids=["prompt tuning", "loha", "alora"],
)
def test_a_backbone_that_peft_feeds_is_left_to_the_patch(config, kind):
    model = peft.get_peft_model(tiny_causal_lm("llama"), config())
    with pytest.raises(ValueError, match=rf"inside PeftModelForCausalLM \({kind}\).*patch_causal_lm"):
        CausalLM(model)
    theirs = own_loss(model)
    torch.testing.assert_close(patch_causal_lm(model, in_eval=True)(**packed_batch()).loss.detach(), theirs)


def test_an_adapter_that_is_not_understood_is_noticed_when_it_becomes_active():
    model = patch_causal_lm(adapted().train())
    model.add_adapter("dora", peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM", use_dora=True))
    assert model(**packed_batch()).logits is None
    model.set_adapter("dora")
    with pytest.raises(ValueError, match="the adapter 'dora' of its output head"):
        model(**packed_batch())
    model.set_adapter("default")
    assert model(**packed_batch()).logits is None


def test_batches_with_an_adapter_for_each_row_are_refused():
    model = with_second_adapter(adapted()).eval()
    batch = packed_batch() | {"adapter_names": ["default", "second"]}
    assert model(**batch).logits is not None
    patch_causal_lm(model, in_eval=True)
    with pytest.raises(ValueError, match=r"got more than hidden states \(adapter_names\)"):
        model(**batch)


def test_peft_after_the_patch_is_noticed():
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    for options in (config, peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")):
        model = peft.get_peft_model(patch_causal_lm(tiny_causal_lm("llama")), options).train()
        with pytest.raises(ValueError, match="is another one than when it was patched"):
            model(**packed_batch())
        compare(unpatch_causal_lm(model))


class Quantised(nn.Linear):
    """Stands for a layer whose weight is not what it multiplies with."""

    def forward(self, hidden):
        return super().forward(hidden) * 2


def test_quantised_heads_are_refused():
    model = tiny_causal_lm("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    refused(model, "its output head is torch.int8 on cpu")

    model = tiny_causal_lm("llama")
    weight = model.lm_head.weight.detach()
    model.lm_head.weight = nn.Parameter(TwoTensor(weight, weight))
    refused(model, "its output head's weight is a TwoTensor")

    model = tiny_causal_lm("llama")
    model.lm_head = Quantised(32, 101, bias=False)
    refused(model, "Quantised, not a plain nn.Linear")

    model = adapted()
    lora = model.get_base_model().lm_head
    lora.base_layer = Quantised(32, 101, bias=False)
    refused(model, "Quantised, not a plain nn.Linear")


def test_replaced_forward_of_a_head_is_refused():
    saved = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    for model in (tiny_causal_lm("llama"), adapted(), peft.get_peft_model(tiny_causal_lm("llama"), saved)):
        head = getattr(model, "get_base_model", lambda model=model: model)().lm_head
        own = head.forward
        head.forward = lambda hidden, own=own: own(hidden) * 2
        refused(model, r"replaced the `forward` of its output head (torch|peft)\..* by builtins\.function")
