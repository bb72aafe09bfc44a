"""The steering benchmark on a small scale: a policy collapses, another is held, and tables tell them apart."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from litropy.config_files import packaged_configs
from litropy.recipes.rlvr_judging import distinct_correct_at_k
from litropy.recipes.rlvr_samples import RewardResult

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


@pytest.fixture
def run_main(script, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["steering.py", *map(str, arguments)])
        script("steering").main()

    return run


def test_entropy_collapses_unless_it_is_held(script, run_main, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script("steering_tabular"), "BATCHES", 100)
    path = tmp_path / "steering.json"
    words = ["--tasks", "tabular", "--methods", "grpo", "entropy_target-here", "entropy_bonus-here", "--seeds", 1]
    run_main(*words, "--output", path)
    record = json.loads(path.read_text())
    grpo, bonus, target = record["runs"]
    tables = script("steering_tables")
    assert grpo["curves"]["batch"] == list(range(0, 101, 10))
    assert tables.collapses(grpo)
    assert not tables.collapses(target)
    assert tables.held(target, 0.5)
    assert not tables.held(grpo, 0.5)
    assert tables.end(grpo, "pass_at_1") > 0.8
    assert tables.end(bonus, "pass_at_1") > tables.end(grpo, "pass_at_1") - 0.1
    assert tables.end(bonus, "distinct_correct") > 1.3 * tables.end(grpo, "distinct_correct")
    out = capsys.readouterr().out
    assert "2/3 tabular, entropy_target-here, seed 0: entropy 2." in out
    assert "| GRPO loses 80% of its entropy | all of 1: " in out
    assert "| `entropy_target-here` holds its target within 0.1 nats | all of 1: H* = 0.5, last quarter 0." in out

    text = path.read_text()
    run_main(*words, "--output", path)
    assert "0 of 3 runs to make." in capsys.readouterr().out
    assert path.read_text() == text
    known = script("steering").still_true(record, record["methods"])
    assert list(known) == [("tabular", name, 0, 100) for name in ("grpo", "entropy_bonus-here", "entropy_target-here")]
    other = json.loads(text)["methods"]
    other["tabular"]["entropy_bonus-here"]["changes"]["regularisers.coefficient"] = 0.2
    assert [plan[1] for plan in script("steering").still_true(record, other)] == ["grpo", "entropy_target-here"]
    tables.draw(tmp_path / "figure.png", record)
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_transformer_goes_on_from_one_supervised_phase(script, run_main, monkeypatch, tmp_path):
    transformer = script("steering_transformer")
    monkeypatch.setattr(transformer, "BATCHES", 4)
    monkeypatch.setattr(transformer, "_WARM_STEPS", 40)
    transformer.warm_start.cache_clear()
    path = tmp_path / "steering.json"
    run_main(
        "--tasks", "transformer", "--methods", "grpo", "entropy_bonus-here", "top_p", "--seeds", 1, "--output", path
    )
    runs = json.loads(path.read_text())["runs"]
    assert [run["method"] for run in runs] == ["grpo", "entropy_bonus-here", "top_p"]
    assert [run["curves"]["batch"] for run in runs] == [[0, 4]] * 3
    assert len({run["curves"]["pass_at_1"][0] for run in runs}) == 1
    assert len({run["curves"]["entropy"][1] for run in runs}) == 3
    assert transformer.warm_start.cache_info().misses == 1
    transformer.warm_start.cache_clear()


def test_every_fragment_is_there_and_changes_are_understood(script):
    methods = script("steering_methods").all_methods()
    fragments = [name for name in packaged_configs() if name.startswith("steering/")]
    assert {f"steering/{method.fragment}.yaml" for method in methods.values()} == set(fragments)
    assert next(iter(methods)) == "grpo"
    build, options = script("steering_methods").build, script("steering_tabular").OPTIONS
    model = build(methods["clip_cov-here"], "tabular", options)
    assert (model.methods.masks[0].share, model.methods.masks[0].low, model.epochs) == (0.3, 0.1, 4)
    assert build(methods["dr_grpo"], "transformer", options).methods.aggregation.length == 4
    described = script("steering_methods").described(methods, "transformer")
    assert [described[name]["target"] for name in ("ter", "ter-here", "entropy_anchor")] == [0.55, 0.3, "start"]


def test_exact_numbers_are_what_sampling_estimates(script):
    record = script("steering_record")
    generator = torch.Generator().manual_seed(0)
    chance = torch.tensor([0.5, 0.2, 0.1, 0.2])  # three right answers to one prompt, and all that is wrong
    found = record.passes(chance[:3].log(), torch.zeros(3, dtype=torch.int64))
    assert found["pass_at_1"] == pytest.approx(0.8)
    drawn = torch.multinomial(chance, 200 * 64, replacement=True, generator=generator).view(200, 64).tolist()
    estimates = [distinct_correct_at_k([RewardResult(0.0, a < 3, str(a)) for a in row], record.K) for row in drawn]
    assert found["distinct_correct"] == pytest.approx(sum(estimates) / 200, abs=0.02)
    digits, target = record.solutions()
    assert torch.equal(digits.sum(-1), target)
    assert torch.bincount(target).tolist() == [*range(1, 11), *range(9, 0, -1)]


def test_a_table_is_measured_by_the_chances_of_its_answers(script):
    tabular = script("steering_tabular")
    table = tabular.Table(torch.Generator().manual_seed(1))
    with torch.no_grad():
        first = table.logits[:19].softmax(-1)
        second = table.logits[19:].softmax(-1).view(19, 10, 10)
    right = [sum(float(first[s, a] * second[s, a, s - a]) for a in range(10) if 0 <= s - a <= 9) for s in range(19)]
    assert table.measure()["pass_at_1"] == pytest.approx(sum(right) / 19, rel=1e-5)


def made_up(method, seed, answers, share, entropy=(1.0, 0.5, 0.1, 0.1, 0.1)):
    curves = {"batch": [0, 1, 2, 3, 4], "entropy": list(entropy)}
    curves |= {"distinct_correct": [3.0, *[answers] * 4], "pass_at_1": [0.2, *[share] * 4]}
    return {"task": "tabular", "method": method, "seed": seed, "batches": 4, "curves": curves, "commit": "abc",
            "cpu_seconds": 1.0}  # fmt: skip


def test_verdicts_follow_from_the_numbers(script):
    tables = script("steering_tables")
    ends = {
        "grpo": [(1.0, 0.9), (1.1, 0.8), (1.0, 0.9)],
        "more": [(2.0, 0.9), (2.2, 0.8), (1.9, 0.88)],
        "dearer": [(2.0, 0.5), (2.2, 0.5), (1.9, 0.5)],
        "noisy": [(2.5, 0.9), (0.4, 0.8), (1.5, 0.9)],
        "worse": [(1.0, 0.3), (1.1, 0.2), (1.0, 0.3)],
        "fewer": [(0.5, 0.9), (0.6, 0.8), (0.4, 0.9)],
        "righter": [(1.0, 1.0), (1.1, 0.9), (1.0, 1.0)],
        "once": [(9.0, 1.0)],
    }
    record = {
        "k": 16, "seeds": 3, "batches": {"tabular": 4}, "machine": {"hardware": "a machine"},
        "methods": {"tabular": {name: {"changes": {}, "target": None} for name in ends}},
        "runs": [made_up(name, seed, *end) for name, found in ends.items() for seed, end in enumerate(found)],
    }  # fmt: skip
    record["methods"]["tabular"]["more"] = {"changes": {"regularisers.coefficient": 0.1}, "target": 0.15}
    record["runs"].append({**made_up("fewer", 3, 9.0, 1.0), "batches": 7})  # of another length: not counted
    verdicts = {name: tables.verdict(record, "tabular", name) for name in ends}
    assert verdicts == {
        "grpo": "no clear difference", "more": "helps", "dearer": "trades accuracy", "noisy": "no clear difference",
        "worse": "hurts", "fewer": "hurts", "righter": "helps", "once": "not enough runs",
    }  # fmt: skip
    facts = tables.facts_table(record).splitlines()[2:]
    assert facts == [
        "| GRPO loses 80% of its entropy | all of 3: 90 % |",
        "| more distinct right answers at equal accuracy | `more` |",
        "| methods that help / trade accuracy / make no clear difference / hurt | 2 / 1 / 1 / 2 |",
        "| `more` holds its target within 0.1 nats | all of 3: H* = 0.15, last quarter 0.10 |",
    ]
    rows = tables.methods_table(record, "tabular").splitlines()[2:]
    assert rows[0].startswith("| `grpo` | - | 3 | 0.10 ± 0.00 | 10% | 0.87 ± 0.06 | 1.03 ± 0.06 | - | - |")
    assert rows[1].startswith("| `more` | `coefficient: 0.1` | 3 |")
    assert rows[1].endswith("| 2.03 ± 0.15 | 1.03 | helps |")
    assert tables.as_accurate(record, "tabular", made_up("x", 0, 1.0, 0.2)) == 3.0
    assert "tabular, `once` (1 of 3)" in tables.incomplete(record)
    assert "`more`" not in tables.incomplete(record)
    assert tables.last_quarter(made_up("x", 0, 1.0, 1.0, (2.0, 1.0))) == [1.0]
    assert not tables.held(made_up("x", 0, 1.0, 1.0, (2.0, 1.0, 1.0, 1.0, 1.85)), "start")
    assert tables.held(made_up("x", 0, 1.0, 1.0, (2.0, 1.0, 1.0, 1.0, 1.95)), "start")
