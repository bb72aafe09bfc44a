"""What is exported is a plain model: adapters merged, ties stored once, SigmaReparam folded."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from litropy.callbacks import CompressedCheckpointIO, SigmaReparam
from litropy.recipes import LanguageModel
from litropy.recipes.exported_checkpoint import export_checkpoint
from litropy.recipes.hugging_face_folder import write_folder
from litropy.recipes.plain_weights import plain_weights, tie
from litropy.testing import tiny_causal_lm

TIED = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
TIED |= {"num_attention_heads": 2, "vocab_size": 48, "tie_word_embeddings": True}


def adapted(architecture="llama", model=None, **options):
    torch.manual_seed(0)
    targets = ["c_attn"] if architecture == "gpt2" else ["q_proj", "down_proj"]
    options = {"target_modules": targets, "task_type": "CAUSAL_LM", "init_lora_weights": False} | options
    return peft.get_peft_model(model or tiny_causal_lm(architecture), peft.LoraConfig(r=2, lora_alpha=3, **options))


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("llama", {}), ("gpt2", {}), ("llama", {"modules_to_save": ["lm_head"], "use_rslora": True})],
)
def test_adapters_are_merged_as_peft_merges_them(architecture, options, tmp_path):
    model = adapted(architecture, **options)
    write_folder(model, None, tmp_path / "plain", plain_weights(model, model.state_dict()))
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_adapters_without_a_peft_model_are_merged_too(tmp_path):
    model = tiny_causal_lm("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    write_folder(model, None, tmp_path / "plain", plain_weights(model, model.state_dict()))
    loaded = load_file(tmp_path / "plain" / "model.safetensors")
    changed = {name for name in loaded if not torch.equal(loaded[name], before[name])}
    assert changed
    assert all("q_proj" in name for name in changed)


def test_other_adapters_are_refused():
    model = adapted(use_dora=True)
    with pytest.raises(ValueError, match=r"'default' is a .*, not plain LoRA"):
        plain_weights(model, model.state_dict())


def built(**options):
    module = LanguageModel(config=TIED, **options)
    module.configure_model()
    return module


def test_tied_weights_are_stored_once_even_when_gathered_apart(tmp_path):
    causal_lm = built().causal_lm
    gathered = {name: value.clone() for name, value in causal_lm.state_dict().items()}
    write_folder(causal_lm, None, tmp_path / "plain", plain_weights(causal_lm, gathered))
    assert "lm_head.weight" not in load_file(tmp_path / "plain" / "model.safetensors")
    gathered["lm_head.weight"] = gathered["lm_head.weight"] + 1
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        tie(causal_lm, gathered)


@pytest.mark.parametrize("compressed", [True, False])
def test_a_checkpoint_becomes_a_folder_with_its_dtype_and_sigma_reparam_folded(compressed, tmp_path):
    module = built()
    module.model.bfloat16()
    SigmaReparam().insert(module.model)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    if compressed:
        CompressedCheckpointIO().save_checkpoint(checkpoint, tmp_path / "x.ckpt")
    else:
        torch.save(checkpoint, tmp_path / "x.ckpt")
    export_checkpoint(tmp_path / "x.ckpt", tmp_path / "plain")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(info.values())
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["dtype"] == "bfloat16"
    expected = plain_weights(module.causal_lm, module.causal_lm.state_dict())
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name
        assert value.dtype == torch.bfloat16
    assert "lm_head.weight" not in load_file(tmp_path / "plain" / "model.safetensors")


def test_checkpoints_that_cannot_be_exported_say_why(tmp_path):
    module = built()
    checkpoint = {"state_dict": module.state_dict()}
    torch.save(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of a LanguageModel"):
        export_checkpoint(tmp_path / "x.ckpt", tmp_path / "plain")
    module.on_save_checkpoint(checkpoint)
    config = json.loads(checkpoint["causal_lm_config"]) | {"num_hidden_layers": 2}
    torch.save(checkpoint | {"causal_lm_config": json.dumps(config)}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="does not hold the weights of its LlamaForCausalLM"):
        export_checkpoint(tmp_path / "x.ckpt", tmp_path / "plain")
    peft_model = adapted(model=module.causal_lm)
    state = {f"model.causal_lm.{name}": value for name, value in peft_model.state_dict().items()}
    torch.save(checkpoint | {"state_dict": state}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="holds LoRA adapters"):
        export_checkpoint(tmp_path / "x.ckpt", tmp_path / "plain")
    torch.save(checkpoint | {"other": module}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="is not unpickled"):
        export_checkpoint(tmp_path / "x.ckpt", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
