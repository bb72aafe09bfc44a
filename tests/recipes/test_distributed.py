"""Two CPU processes under Lightning's DDP and FSDP2 strategies against one process."""

import importlib.util
from pathlib import Path

import gloo_ranks
import pytest
import torch
from transformers import AutoModelForCausalLM

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def worker():
    spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def single(worker):
    """The reference: one process, whole batches."""
    return worker.train("single")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the two ranks have left their results."""
    folder = tmp_path_factory.mktemp("ranks")
    gloo_ranks.launch(WORKER, folder)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return torch.load(folder / "found.pt", weights_only=False)


def assert_same_training(ours, theirs):
    for name, weight in theirs["weights"].items():
        torch.testing.assert_close(
            ours["weights"][name], weight, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert len(ours["logged"]) == len(theirs["logged"])
    for mine, other in zip(ours["logged"], theirs["logged"], strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    assert ours["val"] == pytest.approx(theirs["val"], rel=1e-5)


def test_accumulation_equals_one_large_batch(worker, single):
    assert_same_training(worker.train("single", accumulate=4)[0], single)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_equal_one_process(found, single, strategy, accumulate):
    assert_same_training(found[strategy, accumulate], single)


def test_tied_head_under_sharding(worker, found):
    assert_same_training(found["tied"], worker.train("single", keys={"tie_word_embeddings": True})[0])


def test_router_loss_is_averaged_over_ranks_by_their_targets(worker, found):
    # the balance of experts is not a mean over tokens, so ranks can agree with one process only roughly
    single = worker.train("single", architecture="mixtral")[0]
    losses = [[step["train/loss"] for step in run["logged"]] for run in (found["mixture"], single)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_root_unit_is_gathered_once_a_forward_and_backward(found):
    assert found["fsdp", 1]["gathers"] == [1] * 3
    assert found["fsdp", 2]["gathers"] == [1] * 5


def test_half_precision_under_sharding_follows_full_precision(found, single):
    losses = [[step["train/loss"] for step in run["logged"]] for run in (found["bf16"], single)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert all(weight.dtype == torch.float32 for weight in found["bf16"]["weights"].values())


def test_resumed_sharded_run_equals_one_that_was_not_interrupted(found):
    assert found["resumed"]["logged"] == found["whole"]["logged"][3:]
    for name, weight in found["whole"]["weights"].items():
        assert torch.equal(found["resumed"]["weights"][name], weight), name


def test_shards_are_gathered_into_a_hugging_face_folder(folder, found):
    model = AutoModelForCausalLM.from_pretrained(folder / "hugging_face")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, found["whole"]["weights"][f"causal_lm.{name}"]), name


def test_generation_under_sharding_equals_that_of_the_saved_model(folder, found):
    model = AutoModelForCausalLM.from_pretrained(folder / "hugging_face")
    tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    completion = " ".join(map(str, tokens[0, 3:].tolist()))
    assert found["generated"] == [{"prompt": "5 6 7", "completion": completion}]
