"""Two processes against one: the callbacks that watch a policy, and fine-tuning that spares its entropy."""

import json
from pathlib import Path

import policy_worker as worker
import pytest
import torch
from gloo_ranks import launch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launch(worker.__file__, folder)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(2)]


def close(value):
    return pytest.approx(value, rel=1e-4, abs=1e-6)


def test_a_watched_run_logs_what_one_process_does(ranks, tmp_path):
    alone = worker.watched_run(tmp_path, "auto")
    ours, theirs = (rank["watched"] for rank in ranks)
    assert ours["logged"] == theirs["logged"]
    assert set(ours["logged"]) == set(alone["logged"])
    for group in ("covariance/", "quadrant/", "length/", "solutions/", "entropy_change/", "entropy_law/"):
        assert any(name.startswith(group) for name in alone["logged"]), group
    for name, value in alone["logged"].items():
        # the line's ceiling lies far from its points, so that their rounding grows
        expected = pytest.approx(value, rel=0.01, abs=1e-3) if name.startswith("entropy_law/") else close(value)
        assert ours["logged"][name] == expected, name
    assert ours["points"] == theirs["points"]
    assert [number for point in ours["points"] for number in point] == close(
        [number for point in alone["points"] for number in point]
    )
    assert len(alone["points"]) == 6
    assert ours["change"]["sums"] == theirs["change"]["sums"] == close(alone["change"]["sums"])


def test_the_first_rank_alone_writes_samples(ranks):
    assert ranks[1]["watched"]["table"] == "None"
    lines = Path(ranks[0]["watched"]["table"]).read_text().splitlines()
    assert len({json.loads(line)["step"] for line in lines}) == 6
    assert len(lines) == 6 * 4


def test_what_is_selected_and_remembered_does_not_depend_on_the_ranks(ranks):
    alone = worker.selected_run("auto")
    ours, theirs = (rank["selected"] for rank in ranks)
    assert ours["states"]["sampler:AdaptiveTemperature"] == theirs["states"]["sampler:AdaptiveTemperature"]
    assert ours["states"]["sampler:AdaptiveTemperature"] == close(alone["states"]["sampler:AdaptiveTemperature"])
    for found in (ours, theirs):
        waiting, expected = (run["states"]["data:RecentSampleRecovery"]["kept"] for run in (found, alone))
        assert waiting["responses"].tolist() == expected["responses"].tolist()
        assert len(waiting["responses"]) > 0
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(ours["weights"][name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_fine_tuning_that_spares_entropy_equals_one_process(ranks, strategy):
    alone = worker.fine_tuned("auto")
    ours, theirs = (rank[strategy] for rank in ranks)
    assert ours["logged"] == theirs["logged"]
    for mine, expected in zip(ours["logged"], alone["logged"], strict=True):
        assert mine == close(expected)
    assert set(ours["weights"]) == set(alone["weights"])
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(ours["weights"][name], weight, rtol=1e-4, atol=1e-6)


def test_sharding_a_policy_is_refused(ranks):
    said = {rank["refused"] for rank in ranks}
    assert said == {"RLVR trains on one device or with DDPStrategy, not with ModelParallelStrategy."}
