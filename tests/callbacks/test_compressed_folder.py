"""Compressed Hugging Face folders load bit for bit where litropy is imported, and nowhere else."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM

from litropy.callbacks.compressed_folder import compress_folder, decompress_folder
from litropy.callbacks.compressed_quantizer import CompressedConfig, CompressedQuantizer, Decode

SIZES = {
    "llama": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8},
    "gpt2": {},
    "mixtral": {"num_key_value_heads": 1, "num_local_experts": 3},
    # the bias of its router stays in float32
    "deepseek_v3": {
        "num_key_value_heads": 2, "moe_intermediate_size": 8, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    },
}  # fmt: skip


def tiny(architecture, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}
    inner = {} if architecture == "gpt2" else {"intermediate_size": 24}
    config = AutoConfig.for_model(architecture, **sizes, **inner, **SIZES[architecture])
    return AutoModelForCausalLM.from_config(config, **options)


@pytest.fixture
def one_rank(tmp_path):
    """A mesh of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def assert_same_weights(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert list(left) == list(right)
    for name, weight in left.items():
        assert right[name].dtype == weight.dtype, name
        left_bytes, right_bytes = (x.contiguous().view(-1).view(torch.uint8) for x in (weight, right[name]))
        assert torch.equal(left_bytes, right_bytes), name


@pytest.fixture(scope="module", params=SIZES)
def folders(request, tmp_path_factory):
    """A model, its plain folder and the compressed one; in two files where it has experts."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny(request.param, dtype=torch.float16)
    with torch.no_grad():
        next(model.parameters()).view(-1)[:3] = torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.float16)
    model.save_pretrained(folder / "plain", **({"max_shard_size": "12KB"} if request.param == "mixtral" else {}))
    report = compress_folder(folder / "plain", folder / "compressed")
    return request.param, AutoModelForCausalLM.from_pretrained(folder / "plain"), folder, report


def test_it_loads_bit_for_bit_and_is_an_ordinary_model(folders, tmp_path):
    architecture, model, folder, report = folders
    assert report["bit_exact"]
    assert json.loads((folder / "compressed" / "litropy_report.json").read_text()) == report
    loaded = AutoModelForCausalLM.from_pretrained(folder / "compressed", variant="litropy")
    assert_same_weights(model, loaded)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert getattr(loaded.config, "quantization_config", None) is None
    assert len(list((folder / "compressed").glob("*.safetensors"))) > (architecture == "mixtral")
    # what it saves is plain again
    loaded.save_pretrained(tmp_path / "again")
    assert_same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path / "again"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_dtype_may_be_asked_for(dtype, folders):
    _, _, folder, _ = folders
    loaded = AutoModelForCausalLM.from_pretrained(folder / "compressed", variant="litropy", dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=dtype)
    assert_same_weights(plain, loaded)


def test_it_becomes_the_plain_folder_again(folders, tmp_path):
    _, _, folder, _ = folders
    decompress_folder(folder / "compressed", tmp_path / "plain")
    names = sorted(path.name for path in (folder / "plain").iterdir())
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == [*names[:-1], names[-1]]
    expected = AutoModelForCausalLM.from_pretrained(folder / "plain")
    assert_same_weights(expected, AutoModelForCausalLM.from_pretrained(tmp_path / "plain"))


ATTEMPTS = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM
folder = sys.argv[1]
for cls in (AutoModelForCausalLM, AutoModel, LlamaForCausalLM):
    variant = {"variant": "litropy"}
    for options in ({}, variant, {**variant, "use_safetensors": True}, {**variant, "ignore_mismatched_sizes": True}):
        try:
            cls.from_pretrained(folder, **options)
        except Exception as error:
            print("refused", "import litropy.huggingface" in str(error))
        else:
            print("LOADED", cls, options)
assert "litropy" not in sys.modules
"""


def test_without_litropy_every_way_of_loading_is_an_error(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "plain")
    compress_folder(tmp_path / "plain", tmp_path / "compressed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", ATTEMPTS, str(tmp_path / "compressed")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["refused True"] * 12, done.stdout


def test_tensor_parallel_plans_are_refused(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "plain")
    compress_folder(tmp_path / "plain", tmp_path / "compressed")
    config = AutoConfig.from_pretrained(tmp_path / "compressed")
    config.distributed_config = {"tp_size": 2, "tp_plan": "auto"}
    with pytest.raises(ValueError, match=r"`tp_size` is 2: .* `litropy decompress` the folder first"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "compressed", variant="litropy", config=config)


def test_a_sharded_parameter_is_refused(one_rank):
    model = torch.nn.Linear(2, 2)
    model.get_parameter_or_buffer = model.get_parameter
    model.weight = torch.nn.Parameter(distribute_tensor(model.weight.detach(), one_rank, [Shard(0)]))
    decode = Decode(CompressedQuantizer(CompressedConfig()))
    with pytest.raises(ValueError, match=r"weight is sharded: .* tensor-parallel plan"):
        decode.convert({"weight": [torch.zeros(3, dtype=torch.uint8)]}, full_layer_name="weight", model=model)


def test_damage_is_an_error(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "plain")
    compress_folder(tmp_path / "plain", tmp_path / "compressed")
    path = tmp_path / "compressed" / "model.litropy.safetensors"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises((ValueError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "compressed", variant="litropy")
    with pytest.raises(ValueError, match="checksum"):
        decompress_folder(tmp_path / "compressed", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        compress_folder(tmp_path, tmp_path / "x")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        compress_folder(tmp_path, tmp_path / "x")
    with pytest.raises(ValueError, match="exists and is not overwritten"):
        compress_folder(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="not compressed by litropy"):
        decompress_folder(tmp_path, tmp_path / "x")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    with pytest.raises(ValueError, match="quantised or compressed already"):
        compress_folder(tmp_path, tmp_path / "x")
    (tmp_path / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
    with pytest.raises(ValueError, match=r"'other\.safetensors' in config\.json"):
        compress_folder(tmp_path, tmp_path / "x")
