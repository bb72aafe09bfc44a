"""The output monitor on two CPU processes under DDP and FSDP2, against one process."""

import importlib.util
from pathlib import Path

import gloo_ranks
import pytest
import torch

WORKER = Path(__file__).with_name("output_entropy_worker.py")
spec = importlib.util.spec_from_file_location("output_entropy_worker", WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the two ranks has found."""
    folder = tmp_path_factory.mktemp("ranks")
    gloo_ranks.launch(WORKER, folder)
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(2)]


def without_time(steps):
    return [{name: value for name, value in step.items() if not name.endswith("_ms")} for step in steps]


@pytest.mark.parametrize("name", worker.MODULES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_every_rank_logs_the_token_means_of_all_ranks(found, name, strategy):
    first, second = (rank[name, strategy] for rank in found)
    alone = worker.train(name)
    assert without_time(first["logged"]) == without_time(second["logged"])
    assert first["readings"] == second["readings"]
    assert len(first["logged"]) == len(alone["logged"]) == 2
    for ours, theirs in zip(without_time(first["logged"]), without_time(alone["logged"]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert first["readings"] == pytest.approx(alone["readings"], rel=1e-4)


@pytest.mark.parametrize("dim", [1, 2])
def test_rows_of_logits_in_parts_are_whole(found, dim):
    for rank in found:
        assert torch.equal(rank["parts", dim], rank["parts", "all"])
