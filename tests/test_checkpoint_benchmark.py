"""benchmarks/checkpoint.py measures what it says, and names who did not run."""

import importlib
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


@pytest.fixture
def source(script, tmp_path):
    return next(iter(script("checkpoint_sources").gaussian(tmp_path, 1 << 12)))


def test_the_quick_form_measures_and_names_who_is_absent(script, tmp_path, monkeypatch):
    output = tmp_path / "checkpoint.json"
    contenders = ["litropy, zstd", "litropy, file", "zipnn", "safetensors"]
    monkeypatch.setitem(sys.modules, "zipnn", None)
    monkeypatch.setattr(
        sys, "argv", ["x", "--quick", "--threads", "1", "--output", str(output), "--contenders", *contenders]
    )
    script("checkpoint").main()
    record = json.loads(output.read_text())
    assert [(case["dtype"], case["apart"], len(case["results"])) for case in record["cases"]] == [
        ("bfloat16", 0, 3), ("bfloat16", 1, 1), ("float32", 0, 3), ("float32", 1, 1),
    ]  # fmt: skip
    for case in record["cases"]:
        assert [row["name"] for row in case["not_run"]] == ["zipnn"]
        assert "import of zipnn halted" in case["not_run"][0]["reason"]
        for row in case["results"]:
            assert row["encode_gb_per_s"] > 0
            assert row["decode_gb_per_s"] > 0
            assert row["decode_extra_mib"] >= 0
    ratios = {row["name"]: row["ratio"] for row in record["cases"][0]["results"]}
    assert record["cases"][0]["entropy"] == pytest.approx(0.658, abs=0.005)
    assert ratios["litropy, zstd"] == pytest.approx(record["cases"][0]["entropy"], abs=0.02)
    assert ratios["safetensors"] == pytest.approx(1, abs=0.01)
    assert record["cases"][1]["entropy"] < 0.5 * record["cases"][0]["entropy"]
    assert record["saving"]["bytes"] == 3 * 4 * (1 << 16)
    assert record["saving"]["compressed_ms"] > 0
    table = script("checkpoint_tables").checkpoint(record, "x.png")
    assert "| compressed, in the background | " in table
    assert "x.png" not in table, "nothing of this is in the figure"
    assert "**Gaussian, bf16, 0.1 MB; entropy of the words 65." in table
    assert "| litropy, zstd | 1 | 6" in table
    assert "- zipnn (all): `ModuleNotFoundError: import of zipnn halted" in table


def test_what_decodes_to_something_else_has_no_result(script, source):
    codecs, checkpoint = script("checkpoint_codecs"), script("checkpoint")

    def lossy(threads):
        def encode(tensors, base):
            return {name: x.float().mul(1.5) for name, x in tensors.items()}

        def decode(blob, base):
            return {name: x.bfloat16() for name, x in blob.items()}

        return codecs.Coder(encode, decode, lambda blob: 1)

    found = checkpoint.here(codecs.Contender("lossy", lossy), source, 1, 1, 1)
    assert found == {"reason": "ValueError: decodes to something else: weight, and 0 others"}


def test_a_trial_is_given_up_in_time(script, source):
    found = script("checkpoint").isolated(contender_that(script, lambda: time.sleep(60)), source, 1, 1, 0.1)
    assert found == {"reason": "took more than 0.1 s"}


def test_a_trial_that_dies_has_a_reason(script, source):
    found = script("checkpoint").isolated(contender_that(script, lambda: os._exit(3)), source, 1, 1, 60)
    assert found == {"reason": "exit code 3"}


def test_a_trial_has_a_process_of_its_own(script, source):
    found = script("checkpoint").isolated(contender_that(script, lambda: None), source, 1, 1, 60)
    assert found["ratio"] == pytest.approx(1, abs=0.05)


def contender_that(script, act):
    codecs = script("checkpoint_codecs")
    plain = next(one for one in codecs.CONTENDERS if one.name == "safetensors")

    def make(threads):
        act()
        return plain.make(threads)

    return plain._replace(make=make)


def test_the_figure_shows_size_and_rates(script, tmp_path):
    tables = script("checkpoint_tables")
    result = {"name": "litropy, zstd", "threads": 1, "ratio": 0.66, "encode_gb_per_s": 1.2, "decode_gb_per_s": 1.8}
    case = {"data": "MiniLM", "dtype": "bfloat16", "apart": 0, "bytes": 10, "entropy": 0.66, "not_run": []}
    case["results"] = [result, {**result, "name": "dfloat11, encoder", "decode_gb_per_s": None}]
    record = {"machine": {"hardware": "a machine"}, "cases": [case], "missing": []}
    tables.draw(tmp_path / "x.png", record)
    assert (tmp_path / "x.png").stat().st_size > 5000
    assert "![Size and rates of each contender](x.png)" in tables.checkpoint(record, "x.png")
    tables.draw(tmp_path / "none.png", {**record, "cases": []})
    assert not (tmp_path / "none.png").exists()


def test_entropy_of_differences_counts_what_changed(script):
    old = torch.arange(4096, dtype=torch.int32)
    entropy = script("checkpoint").plane_entropy
    assert entropy({"x": old}, {"x": old}) == 0
    # one bit for each of the lowest bytes
    assert entropy({"x": old + torch.arange(4096, dtype=torch.int32) % 2}, {"x": old}) == pytest.approx(1 / 32)
