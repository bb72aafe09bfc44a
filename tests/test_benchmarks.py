"""The benchmark scripts measure what they say, and the report shows what they recorded."""

import importlib
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


def test_truth_is_the_gradient_of_the_mean_loss(script):
    measuring = script("measuring")
    hidden, weight, target = measuring.Case(7, 5, 11, "float64").inputs("cpu")
    loss, d_hidden, d_weight = measuring.true_gradients(hidden, weight, target)
    expected = F.cross_entropy(F.linear(hidden, weight), target)
    expected.backward()
    assert loss == pytest.approx(expected.item())
    torch.testing.assert_close(d_hidden, hidden.grad)
    torch.testing.assert_close(d_weight, weight.grad)
    assert measuring.relative_error(hidden.grad, d_hidden) < 1e-12
    assert measuring.relative_error(2 * hidden.grad, d_hidden) == pytest.approx(1)


def test_peak_memory_sees_what_is_freed_again(script):
    measuring = script("measuring")
    extra = measuring.peak_extra_bytes(lambda: torch.ones(64 * 2**20 // 4), "cpu")
    assert 62 * 2**20 < extra < 72 * 2**20


def test_linear_head_case(script):
    linear_head, implementations = script("linear_head"), script("implementations")

    def absent():
        raise ModuleNotFoundError("No module named 'peer'")

    contenders = [
        implementations.named("litropy"),
        implementations.named("litropy, reduction none"),
        implementations.named(implementations.NAIVE),
        implementations.Implementation("peer", absent),
    ]
    case = script("measuring").Case(64, 16, 4096, "float32")
    record = linear_head.run_case(case, contenders, "cpu", rounds=2)
    assert [result["name"] for result in record["results"]] == [contender.name for contender in contenders[:3]]
    for result in record["results"]:
        assert result["weight_gradient_error"] < 1e-5
        assert result["input_gradient_error"] < 1e-5
        assert 0 < result["min_ms"] <= result["median_ms"]
        assert result["peak_extra_mib"] >= 0
    assert record["not_run"] == [{"name": "peer", "reason": "not installed or not importable: No module named 'peer'"}]


def test_every_contender_of_the_training_step_computes_the_same_loss(script):
    quickstart_step = script("quickstart_step")
    losses = {name: [] for name in quickstart_step.CONTENDERS}
    for name in losses:
        step = quickstart_step.training_step(name, quick=True)
        losses[name] = torch.stack([step(), step()])
    theirs = losses[quickstart_step.HUGGING_FACE]
    assert theirs[1] < theirs[0]
    for ours in losses.values():
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.fixture
def record(script):
    result = {"name": "a", "median_ms": 1234.5, "min_ms": 9.0, "peak_extra_mib": 12.3}
    result |= {"input_gradient_error": 1e-7, "weight_gradient_error": 2e-7}
    naive = {**result, "name": "b", "median_ms": 2469.0, "peak_extra_mib": None}
    case = {"tokens": 4, "width": 2, "vocabulary": 1000, "dtype": "float32", "results": [result, naive]}
    missing = [{"name": "c", "reason": "no GPU"}]
    machine = {"hardware": "A CPU", "versions": {"torch": "2.13.0"}, "commit": "abc", "date": "2026-01-01"}
    return {"baseline": "b", "machine": machine, "cases": [{**case, "not_run": missing}]}


def test_report_fills_marked_blocks_only(script, record, tmp_path, monkeypatch):
    report = script("report")
    (tmp_path / "linear_head_a-cpu.json").write_text(json.dumps(record))
    (tmp_path / "linear_head_a-cpu_quick.json").write_text("not to be read")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "ASSETS", tmp_path)
    page = "before\n<!-- results: linear_head -->\nold\n<!-- end of results -->\nafter\n"
    text = report.with_results(page, tmp_path / "docs" / "page.md")
    assert text.startswith("before\n<!-- results: linear_head -->\n")
    assert text.endswith("\n<!-- end of results -->\nafter\n")
    assert "old" not in text
    assert "| a | 1,234 | 9.0 | 0.50 | 12 | 1.0e-07 | 2.0e-07 |" in text
    assert "| b | 2,469 | 9.0 | 1.00 | - |" in text
    assert "- c: `no GPU`" in text
    assert report.with_results(text, tmp_path / "docs" / "page.md") == text
    summary = report.linear_head_summary(False)
    assert "| a | 1,234 | 12 |" in summary
    assert "A CPU; torch 2.13.0; commit abc, 2026-01-01; [JSON](linear_head_a-cpu.json)" in summary
    report.draw(tmp_path / "linear_head_a-cpu.json", record)
    assert (tmp_path / "linear_head_a-cpu.png").stat().st_size > 1000
