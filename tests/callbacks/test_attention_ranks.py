"""Attention entropies of two CPU processes under DDP and FSDP2 against those of one."""

import importlib.util
from pathlib import Path

import gloo_ranks
import pytest
import torch

WORKER = Path(__file__).with_name("attention_worker.py")


@pytest.fixture(scope="module")
def worker():
    spec = importlib.util.spec_from_file_location("attention_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the two ranks has found."""
    folder = tmp_path_factory.mktemp("ranks")
    gloo_ranks.launch(WORKER, folder)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in (0, 1)]


def assert_same(ours, theirs, **tolerance):
    for (step, layers, values), (other_step, other_layers, others) in zip(ours[0], theirs[0], strict=True):
        assert (step, layers) == (other_step, other_layers)
        for name, value in others.items():
            torch.testing.assert_close(values[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert mine == pytest.approx(other, rel=max(1e-6, tolerance["rtol"]))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_add_up_to_one_process(worker, found, strategy):
    single = worker.language_model("single")
    assert [reading[0] for reading in single[0]] == [0, 1]
    assert_same(found[0][strategy], single, rtol=2e-5, atol=2e-6)
    assert_same(found[0][strategy], found[1][strategy], rtol=0, atol=0)


def test_a_layer_that_only_one_rank_calls(worker, found):
    single = worker.sometimes("single")
    readings = found[1]["sometimes"][0]
    assert readings[0][1] == single[0][0][1] == (0, 1)
    assert_same(found[0]["sometimes"], found[1]["sometimes"], rtol=0, atol=0)
    # the first layer is that of both sequences
    torch.testing.assert_close(readings[0][2]["attention/entropy"][0], single[0][0][2]["attention/entropy"][0])
    assert readings[0][2]["attention/entropy"].isfinite().all()
