"""The benchmark of what steering methods add to a step."""

import importlib
import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


def test_every_fragment_has_its_turns_between_steps_of_grpo(script):
    overhead = script("steering_overhead")
    some = ["siren", "top_p", "reference_kl", "min_p", "pear", "ter", "tea", "gspo"]
    modules = overhead.steering_fragments(4, some)
    assert set(modules) == {"grpo", "reference model", *some}
    order = overhead.turns_of(modules, rounds=3)
    for name in some:
        places = [place for place, turn in enumerate(order) if turn[0] == name]
        assert len(places) == 3
        for place in places:
            writes = order[place][1]
            assert writes == overhead.is_sampler(modules[name])
            plain = ("reference model" if name == "reference_kl" else "grpo", writes)
            assert plain in order[max(place - overhead.NEIGHBOURS, overhead.WARM_UP) : place]
            assert plain in order[place : place + overhead.NEIGHBOURS + 1]


def test_a_reference_model_is_there_for_those_who_need_it(script):
    assert set(script("steering_overhead").steering_fragments(4, ["siren"])) == {"grpo", "siren"}


def test_what_is_added_is_the_distance_to_the_neighbours(script):
    overhead = script("steering_overhead")
    modules = overhead.steering_fragments(2, ["siren", "top_p", "reference_kl"])
    turns = overhead.Turns(overhead.turns_of(modules, 2), modules, None, None)
    cost = {"grpo": 2.0, "siren": 2.25, "top_p": 1.0, "reference model": 2.5, "reference_kl": 3.0}
    # a machine that slows down from step to step
    turns.steps = [cost[name] + 0.5 * writes + 0.01 * place for place, (name, writes) in enumerate(turns.order)]
    turns.updates = [seconds - 0.5 * writes for seconds, (_, writes) in zip(turns.steps, turns.order, strict=True)]
    found = overhead.evaluate(turns, modules, 2)
    added = {result["name"]: result["added_ms"] for result in found["results"]}
    assert added == pytest.approx({"siren": 250, "top_p": -1000, "reference model": 500, "reference_kl": 500}, abs=15)
    by_name = {result["name"]: result for result in found["results"]}
    assert by_name["top_p"]["of_update"] is None
    assert by_name["siren"]["of_step"] == pytest.approx(by_name["siren"]["added_ms"] / found["step_ms"], rel=1e-3)
    assert (by_name["reference_kl"]["beside"], by_name["siren"]["beside"]) == ("reference model", "grpo")


def test_the_script_measures_and_its_table_is_written(script, tmp_path, monkeypatch):
    overhead, output = script("steering_overhead"), tmp_path / "out.json"
    only = ["siren", "top_p", "dynamic_sampling", "bucket_kl"]
    words = ["--quick", "--prompts", "2", "--group-size", "2", "--output", str(output), "--only", *only]
    monkeypatch.setattr(sys, "argv", [overhead.__file__, *words])
    overhead.main()
    record = json.loads(output.read_text())
    assert {result["name"] for result in record["results"]} == {"reference model", *only}
    assert record["step_ms"] > record["update_ms"] > 0
    table = script("tables").steering_overhead(record)
    assert "| `dynamic_sampling` | `grpo` | more responses" in table
    assert "| `bucket_kl` | reference model |" in table
    assert "4 responses of 8 tokens" in table
