"""Remedies on two CPU processes under DDP and FSDP2, against one process."""

import importlib.util
from pathlib import Path

import gloo_ranks
import pytest
import torch

WORKER = Path(__file__).with_name("remedy_worker.py")


@pytest.fixture(scope="module")
def worker():
    spec = importlib.util.spec_from_file_location("remedy_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both ranks have found."""
    folder = tmp_path_factory.mktemp("ranks")
    gloo_ranks.launch(WORKER, folder)
    return [torch.load(folder / f"found{rank}.pt", weights_only=False) for rank in (0, 1)]


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


STRATEGIES = pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@STRATEGIES
def test_spectral_norms_on_two_ranks_are_those_on_one(worker, found, strategy):
    alone, ours = worker.sigma("single"), found[0]["sigma", strategy]
    assert_same(ours["state"], alone["state"], **CLOSE)
    assert_same(ours["folded"], alone["folded"], **CLOSE)
    assert torch.equal(ours["vectors"], found[1]["sigma", strategy]["vectors"])
    assert_same(ours["resumed"], ours["state"], rtol=0, atol=0)


def test_sharding_before_reparametrising_is_refused(found):
    assert "before `fully_shard`" in found[0]["sigma", "fsdp"]["too_late"]


@STRATEGIES
def test_heads_are_clipped_by_the_largest_logits_of_all_ranks(worker, found, strategy):
    alone, ours = worker.clip("single"), found[0]["clip", strategy]
    assert alone["clipped"] > 0
    assert ours["clipped"] == alone["clipped"]
    assert_same(ours["state"], alone["state"], **CLOSE)


@STRATEGIES
def test_actions_on_an_alarm_do_the_same_on_all_ranks(worker, found, strategy):
    alone, ours = worker.recover("single"), found[0]["recover", strategy]
    assert alone["factor"] == ours["factor"] < 1
    assert_same(ours["state"], alone["state"], **CLOSE)
    assert_same(ours["resumed"], ours["state"], rtol=0, atol=0)
    assert_same(found[1]["recover", strategy]["state"], ours["state"], rtol=0, atol=0)


@STRATEGIES
def test_heads_are_pulled_by_the_entropies_of_all_ranks(worker, found, strategy):
    alone, ours = worker.regularize("single"), found[0]["regularize", strategy]
    assert_same(ours["state"], alone["state"], **CLOSE)
    assert_same(ours["thresholds"], alone["thresholds"], **CLOSE)
    plain = worker.full_state(worker.train("single", [])[0])
    assert any((plain[name] - value).abs().max() > 1e-3 for name, value in alone["state"].items())
