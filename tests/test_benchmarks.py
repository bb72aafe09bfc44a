"""The benchmark scripts measure what they say, and the report shows what they recorded."""

import csv
import dataclasses
import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


@pytest.fixture
def sharp_head(script, tmp_path):
    """A file of 200 tokens whose softmax is all but certain: nearly nothing lies outside one tile."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2048, 16, generator=generator)
    target = torch.randint(2048, (200,), generator=generator)
    counts = torch.bincount(target, minlength=2048)
    path = tmp_path / "head.safetensors"
    script("trained_head").TrainedHead(3 * weight[target], weight, target, counts).save(path)
    return path


def test_truth_is_the_gradient_of_the_mean_loss(script):
    measuring = script("measuring")
    hidden, weight, target = script("cases").Case(7, 5, 11, "float64").inputs("cpu")
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


def test_rounds_take_turns_and_patience_ends(script):
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    times = script("measuring").interleaved_times(steps, 5, "cpu", patience=0)
    assert order == ["a", "b"] * 3
    assert [len(seconds) for seconds in times.values()] == [3, 3]


def test_a_trained_head_is_sampled_in_windows(script, sharp_head):
    trained_head = script("trained_head")
    head = trained_head.TrainedHead.load(sharp_head)
    head = head._replace(hidden=torch.arange(1000.0)[:, None], target=torch.arange(1000))
    sample = head.sample(512)
    assert sample.target.tolist() == [*range(256), *range(744, 1000)]
    assert sample.hidden[:, 0].tolist() == sample.target.tolist()
    assert head._replace(hidden=head.hidden[:100], target=head.target[:100]).sample(150).target.max() == 99


@pytest.mark.slow
def test_a_head_is_trained_once(script, tmp_path):
    trained_head = script("trained_head")
    tiny = ["--data.max_mebibytes", "0.2", "--data.vocab_size", "400", "--data.sequence_length", "32"]
    tiny += ["--model.config.num_hidden_layers", "1", "--model.config.hidden_size", "32"]
    path = trained_head.trained_file(tmp_path, 2, [*tiny, "--trainer.val_check_interval", "2"])
    head = trained_head.TrainedHead.load(path)
    assert head.hidden.shape[1] == head.weight.shape[1] == 32
    assert len(head.hidden) == len(head.target) > 1000
    assert 0 <= head.target.min() <= head.target.max() < len(head.weight) == len(head.counts)
    (metrics,) = path.parent.glob("runs/*/version_0/metrics.csv")
    validated = [float(row["val/loss"]) for row in csv.DictReader(metrics.open()) if row["val/loss"]]
    assert F.cross_entropy(head.hidden @ head.weight.T, head.target).item() == pytest.approx(validated[-1], rel=1e-5)
    written = path.stat().st_mtime
    assert trained_head.trained_file(tmp_path, 2).stat().st_mtime == written


def test_linear_head_case(script, sharp_head):
    linear_head, implementations = script("linear_head"), script("implementations")

    def absent():
        raise ModuleNotFoundError("No module named 'peer'")

    named = implementations.named
    contenders = [named("litropy"), named("litropy, skip_tol 0.01"), named(implementations.NAIVE)]
    others = [
        implementations.Implementation("peer", absent),
        implementations.Implementation("kernel", lambda: None, needs_gpu=True),
        implementations.Implementation("unknown to the child", lambda: None),
    ]
    case = script("cases").Case.trained(sharp_head, 96, "float32")
    record = linear_head.run_case(case, contenders + others, "cpu", rounds=2, limit=120)
    assert {key: record[key] for key in ("data", "tokens", "width", "vocabulary", "dtype")} == {
        "data": "trained",
        "tokens": 96,
        "width": 16,
        "vocabulary": 2048,
        "dtype": "float32",
    }
    ours, skipping, naive = record["results"]
    assert [result["name"] for result in record["results"]] == [contender.name for contender in contenders]
    for result in (ours, naive):
        assert result["weight_gradient_error"] < 1e-4
        assert result["input_gradient_error"] < 1e-4
    for result in record["results"]:
        assert result["loss_error"] < 1e-5
        assert 0 < result["min_ms"] <= result["median_ms"]
        assert result["peak_extra_mib"] >= 0
        assert result["rounds"] == 2
    assert skipping["surviving_share"] < 0.5
    assert 0 < skipping["mean_skipped_mass"] <= skipping["largest_skipped_mass"] <= 0.01
    assert skipping["weight_gradient_error"] > ours["weight_gradient_error"]
    reasons = {peer["name"]: peer["reason"] for peer in record["not_run"]}
    assert reasons["peer"] == "not installed or not importable: No module named 'peer'"
    assert reasons["kernel"] == "needs a GPU"
    assert "StopIteration" in reasons["unknown to the child"]


@pytest.fixture
def run_main(monkeypatch):
    """Run a script's ``main`` with arguments; it may change the environment, which comes back afterwards."""

    def run(module, *arguments):
        if "TRITON_INTERPRET" in os.environ:
            monkeypatch.setenv("TRITON_INTERPRET", os.environ["TRITON_INTERPRET"])
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        module.main()

    return run


def cache_with(sharp_head, steps, tmp_path):
    """A cache folder in which the model has been trained already."""
    folder = tmp_path / "cache" / f"steps_{steps}"
    folder.mkdir(parents=True)
    sharp_head.rename(folder / "head.safetensors")
    return folder.parent


def test_linear_head_script(script, sharp_head, tmp_path, monkeypatch, run_main):
    linear_head, implementations = script("linear_head"), script("implementations")
    monkeypatch.setattr(linear_head, "IMPLEMENTATIONS", [implementations.named(implementations.NAIVE)])
    cache, output = cache_with(sharp_head, script("trained_head").config_steps(), tmp_path), tmp_path / "out.json"
    run_main(linear_head, "--quick", "--device", "cpu", "--trained", cache, "--output", output)
    record = json.loads(output.read_text())
    assert [(case["data"], case["dtype"], case["vocabulary"]) for case in record["cases"]] == [
        ("trained", "float32", 2048),
        ("trained", "bfloat16", 2048),
        ("random", "float32", 4096),
    ]
    assert all(len(case["results"]) == 1 for case in record["cases"])
    assert record["machine"]["device"] == "cpu"


def test_compile_kernels_script(script, tmp_path, monkeypatch, run_main):
    from litropy.kernels import compile_report

    row = compile_report.CompiledKernel("sm_90", "a_kernel", "bfloat16", "none", 64, 0, 1024, "wgmma", "TMA")
    rows = [row, dataclasses.replace(row, options="all", registers=128)]
    monkeypatch.setattr(compile_report, "compile_report", lambda: iter(rows))
    run_main(script("compile_kernels"), "--output", tmp_path / "compile.json")
    table = script("tables").compile_kernels(json.loads((tmp_path / "compile.json").read_text()))
    assert "A program may use 232,448 bytes of shared memory." in table
    assert "| `a_kernel` | bf16 | 64 / 128 | 0 | 1024 | wgmma | TMA |" in table


def test_a_trial_is_given_up_in_time(script):
    case = script("cases").Case(8, 8, 8, "float32")
    found = script("trial").trial(case, "litropy", "cpu", limit=0.01)
    assert found == {"reason": "took more than 0.01 s for a forward and backward pass in a fresh process"}


@pytest.mark.parametrize("name", ["litropy, lean", "litropy, with 4 statistics", "F.linear_cross_entropy, chunked"])
def test_contenders_compute_the_same_loss(script, name):
    implementations = script("implementations")
    inputs = script("cases").Case(8, 16, 40, "float32").inputs("cpu")
    try:
        loss = implementations.named(name).make()
    except ImportError:
        pytest.skip("torch is older than this loss")
    torch.testing.assert_close(loss(*inputs), implementations.named(implementations.NAIVE).make()(*inputs))


def test_survival_of_a_sharp_and_of_a_flat_softmax(script, sharp_head):
    survival = script("survival")
    head = script("trained_head").TrainedHead.load(sharp_head)
    sharp = survival.measure("sharp", head)
    flat = survival.measure("flat", head._replace(hidden=0 * head.hidden))
    share = {
        name: {(row["order"], row["tile"], row["skip_tol"]): row["surviving_share"] for row in record["rows"]}
        for name, record in (("sharp", sharp), ("flat", flat))
    }
    assert len(sharp["rows"]) == 4 * len(survival.TILES) * len(survival.TOLERANCES)
    assert share["sharp"]["own", (1, 128), 1e-2] < 0.3
    for order, tile, skip_tol in share["sharp"]:
        assert share["sharp"][order, tile, skip_tol] >= share["sharp"][order, tile, 1e-2]
    assert set(share["flat"].values()) == {1.0}
    for row in sharp["rows"]:
        assert row["largest_skipped_mass"] <= row["skip_tol"]
    # likely tokens side by side leave more tiles without any
    assert share["sharp"]["mean probability", (128, 128), 1e-2] < share["sharp"]["random", (128, 128), 1e-2]


def test_survival_script(script, sharp_head, tmp_path, capsys, run_main):
    output = tmp_path / "survival.json"
    cache = cache_with(sharp_head, 7, tmp_path)
    run_main(script("survival"), "--cache", cache, "--steps", 7, "--tokens", 64, "--output", output)
    record = json.loads(output.read_text())
    assert [case["data"] for case in record["cases"]] == ["7 steps", "random"]
    assert [case["tokens"] for case in record["cases"]] == [64, 64]
    assert "mean probability  128 x 128" in capsys.readouterr().out
    table = script("tables").survival(record)
    assert "| order of the vocabulary | tile | 7 steps, 0.0001 |" in table
    assert "| mean probability | 128 x 128 |" in table


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


def test_entropy_of_attention(script):
    benchmark = script("attention_entropy")
    case = benchmark.run_case(benchmark.Case(1, 2, 1, 96, 16, "float32"), "cpu", 2)
    assert [result["name"].split(",")[0] for result in case["results"]] == ["litropy", "stored"] * 2
    assert all(0 < result["min_ms"] <= result["median_ms"] for result in case["results"])
    assert all(result["largest_error"] < 1e-5 for result in case["results"])
    table = script("tables").attention_entropy({"cases": [case]})
    assert "**B = 1, H = 2 (1 of keys), T = 96, D = 16, fp32**" in table
    assert "| litropy, 64 rows |" in table


def test_cost_of_monitors(script):
    monitor_cost = script("monitor_cost")
    record = monitor_cost.measure(monitor_cost.TINY, rows=2, length=16, rounds=2)
    *single, together = record["results"]
    assert [result["name"] for result in single] == list(monitor_cost.MONITORS)
    assert [result["every_n_steps"] for result in single] == [100, 10, 10, 10]
    for result in single:
        share = 1 / result["every_n_steps"]
        amortised = share * max(0, result["probe_extra_ms"]) + (1 - share) * result["between_probes_ms"]
        assert result["amortised_ms"] == pytest.approx(amortised, abs=2e-3)
        # what runs inside of the model comes on top of the callback's own time
        assert result["probe_hooks_ms"] > result["between_probes_ms"] > 0
    assert together["amortised_ms"] == pytest.approx(sum(result["amortised_ms"] for result in single), abs=1e-2)
    assert together["amortised_share"] == pytest.approx(together["amortised_ms"] / record["step_ms"], rel=0.01)
    machine = {"model": "gpt2", "batch_size": 2, "sequence_length": 16}
    table = script("tables").monitor_cost(machine | record)
    assert "| AttentionEntropyMonitor | 1 in 100 |" in table
    assert "| all of them |  |" in table


@pytest.fixture
def record(script):
    result = {"name": "a", "median_ms": 1234.5, "min_ms": 9.0, "peak_extra_mib": 12.3, "loss_error": 3e-7}
    result |= {"input_gradient_error": 1e-7, "weight_gradient_error": 2e-7}
    naive = {**result, "name": "b", "median_ms": 2469.0, "peak_extra_mib": None}
    skipping = {**result, "name": "s", "surviving_share": 0.25, "mean_skipped_mass": 5e-4}
    case = {"data": "random", "tokens": 4, "width": 2, "vocabulary": 1000, "dtype": "float32"}
    case |= {"results": [result, naive, skipping], "not_run": [{"name": "c", "reason": "no GPU"}]}
    other = {**case, "data": "trained", "tokens": 8, "results": [result]}
    other |= {"not_run": [*case["not_run"], {"name": "d", "reason": "too slow"}]}
    machine = {"hardware": "A CPU", "versions": {"torch": "2.13.0"}, "commit": "abc", "date": "2026-01-01"}
    return {"baseline": "b", "machine": machine, "cases": [other, case]}


def test_report_fills_marked_blocks_only(script, record, tmp_path, monkeypatch):
    report = script("report")
    (tmp_path / "linear_head_a-cpu.json").write_text(json.dumps(record))
    (tmp_path / "linear_head_a-cpu_quick.json").write_text("not to be read")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(script("tables"), "ROOT", tmp_path)
    monkeypatch.setattr(report, "ASSETS", tmp_path)
    page = "before\n<!-- results: linear_head -->\nold\n<!-- end of results -->\nafter\n"
    text = report.with_results(page, tmp_path / "docs" / "page.md")
    assert text.startswith("before\n<!-- results: linear_head -->\n")
    assert text.endswith("\n<!-- end of results -->\nafter\n")
    assert "old" not in text
    assert "**Trained model, N = 8, D = 2, V = 1,000, fp32**" in text
    assert "| a | 1,234 | 9.0 | 0.50 | 12 | 3.0e-07 | 1.0e-07 | 2.0e-07 |  |  |" in text
    assert "| b | 2,469 | 9.0 | 1.00 | - |" in text
    assert "| s | 1,234 | 9.0 | 0.50 | 12 | 3.0e-07 | 1.0e-07 | 2.0e-07 | 25% | 5.0e-04 |" in text
    assert "- c: `no GPU`" in text
    assert "- d (N = 8, D = 2, V = 1,000, fp32): `too slow`" in text
    assert report.with_results(text, tmp_path / "docs" / "page.md") == text
    summary = report.linear_head_summary(False)
    assert "| a | 1,234 | 12 |" in summary
    assert "A CPU; torch 2.13.0; commit abc, 2026-01-01; [JSON](linear_head_a-cpu.json)" in summary
    report.draw(tmp_path / "linear_head_a-cpu.json", record)
    assert (tmp_path / "linear_head_a-cpu.png").stat().st_size > 1000
