"""The collapse benchmark on a small scale: a real collapse, and tables that say what was reached and what was not."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


@pytest.fixture
def run_main(script, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["collapse.py", *map(str, arguments)])
        script("collapse").main()

    return run


def test_a_real_collapse_is_recorded_once_and_shown(script, run_main, tmp_path, capsys):
    path = tmp_path / "collapse.json"
    small = ["--only", "collapse", "--seeds", 1, "--steps", 0.1, "--output", path]
    run_main(*small)
    record = json.loads(path.read_text())
    (run,) = record["runs"]
    assert (run["scenario"], run["seed"], run["steps"]) == ("collapse", 0, 30)
    first = run["alarms"][0]
    assert first["rule"] == "attention_entropy"
    assert first["step"] < first["raised"] <= 30
    assert run["loss_shows"] is None
    assert run["curves"]["step"] == [0, 10, 20, 30]
    assert run["curves"]["entropy"][0] > 0.85
    assert run["end"]["entropy"] == run["curves"]["entropy"][-1] < 0.5
    assert len(run["train_loss"]) == 3
    assert "attention_entropy at step" in capsys.readouterr().out

    text = path.read_text()
    run_main(*small)
    assert "0 of 1 runs to make" in capsys.readouterr().out
    assert path.read_text() == text

    tables = script("collapse_tables")
    table = tables.collapse(record, "figure.png")
    assert f"| collapses alarmed within 60 steps | all of 1 runs | after {first['raised']} |" in table
    assert "| SigmaReparam at the collapsing rate reaches the healthy loss | not run | - |" in table
    assert "![Attention entropy, loss and alarms](figure.png)" in table
    assert "healthy (0 of 1)" in table
    tables.draw(tmp_path / "figure.png", record)
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def made_up(scenario, seed, alarms=(), losses=(4.0, 3.0, 2.0, 2.0), shows=None, entropy=0.9):
    alarms = [{"raised": raised, "step": raised - 2, "level": level, "rule": rule} for raised, level, rule in alarms]
    end = {"train_loss": losses[-1], "entropy": entropy, "least_entropy": 0.1, "logit": 9.0, "rank": 1.0}
    curves = {"step": [0, 10, 20, 30, 40], "entropy": [0.9, 0.8, 0.7, 0.2, entropy], "loss": [4.0] * 5}
    return {
        "scenario": scenario, "seed": seed, "steps": 40, "alarms": alarms, "number_of_alarms": len(alarms), "end": end,
        "loss_shows": shows, "train_loss": list(losses), "curves": curves, "commit": "abc",
    }  # fmt: skip


def test_tables_say_what_was_not_reached(script):
    scenarios = script("collapse_scenarios")
    tables = script("collapse_tables")
    record = {
        "every_n_steps": 10,
        "scenarios": scenarios.described(dict.fromkeys(scenarios.SCENARIOS, 40), 2),
        "runs": [
            made_up("collapse", 0, [(20, 1, "attention_entropy"), (30, 2, "attention_collapse")], shows=35),
            made_up("collapse", 1, [(20, 1, "logit_growth")], shows=15, losses=(4.0, 3.5, 3.0, 3.0)),
            made_up("healthy", 0),
            made_up("healthy", 1, [(10, 1, "loss_spike")]),
            made_up("copy", 0, [(10, 2, "sharp_attention")]),
            made_up("rank_collapse", 0, [(20, 1, "representation_rank")]),
            made_up("sigma_reparam", 0, losses=(4.0, 3.0, 2.0, 2.01)),
            made_up("sigma_reparam", 1, losses=(4.0, 3.0, 2.0, 2.2)),
            made_up("recovery", 0, [(30, 2, "attention_collapse")], entropy=0.6),
            made_up("recovery", 1, [(30, 2, "attention_collapse")], entropy=0.4),
            {**made_up("recovery", 2), "steps": 7},  # of another length: not counted
        ],
    }
    lines = tables.numbers_table(record).splitlines()[2:]
    reached = {line.split(" | ")[0].strip("| "): line.split(" | ")[1] for line in lines}
    assert list(reached.values()) == [
        "all of 3 runs",
        "**only 2** of 3 runs",
        "**only 1** of 2 runs",
        "**only 0** of 1 runs",
        "**only 0** of 1 runs",  # attention entropy was 0.7 at that alarm
        "**only 1** of 2 runs",
        "**only 1** of 2 runs",
    ]
    assert lines[-1].endswith("| 0.20 at the alarm, 0.40 to 0.60 at the end |")
    first, second = record["runs"][:2]
    assert (tables.lead_time(first), tables.lead_time(second)) == (15, -5)
    assert tables.falls_behind(record, first) is None
    assert tables.falls_behind(record, second) == 20
    assert "| entropy collapse | 0.03 | 2 x 40 | 20 |" in tables.alarms_table(record)
    assert "30 in 1" in tables.alarms_table(record)
    assert "sharp initialisation (0 of 2)" in tables.incomplete(record)
    assert "rank collapse, post-LN (1 of 2)" in tables.incomplete(record)
    assert "entropy collapse (" not in tables.incomplete(record)


def test_a_loss_alone_tells_by_a_spike_a_stall_or_nan(script):
    loss_shows = script("collapse_record").loss_shows
    falling = [4.0 * 0.99**step for step in range(100)]
    assert loss_shows(falling) is None
    assert loss_shows([*falling[:50], math.nan]) == 51
    assert loss_shows([*falling[:50], *[6.0] * 50]) in range(52, 60)
    stalled = falling[:50] + [falling[50]] * 50
    assert loss_shows(stalled) in range(70, 91)


def test_the_record_measures_what_the_model_computes(script):
    models, record = script("collapse_models"), script("collapse_record")
    tokens = models.sequences("markov", 0, 4)
    module = models.TinyLM(models.tiny_decoder(0, layers=2, sharp=3.0), 1e-2)
    found = record.attention_by_head(module, tokens, models.labels_of(tokens, "markov"))
    module.model.set_attn_implementation("eager")
    with torch.no_grad():
        output = module.model(tokens, output_attentions=True, output_hidden_states=True)
    visible = torch.arange(1, 65).double().log()[7:]
    for entropy, attention in zip(found["entropy"], output.attentions, strict=True):
        rows = torch.special.entr(attention.double()).sum(-1)[..., 7:] / visible
        torch.testing.assert_close(entropy, rows.mean((0, 2)), atol=1e-5, rtol=0)
    rows = torch.nn.functional.normalize(output.hidden_states[1].flatten(0, 1).double(), dim=-1)
    shares = torch.linalg.svdvals(rows)
    shares = shares / shares.sum()
    assert found["rank"][0] == pytest.approx(float(torch.special.entr(shares).sum().exp()), rel=1e-3)
    assert found["logit"].shape == (2, 4)


def test_texts_are_the_same_for_every_run_of_a_seed(script):
    models = script("collapse_models")
    for task in ("markov", "copy"):
        few, many = (models.sequences(task, 3, number) for number in (5, 3000))
        assert torch.equal(few, many[:5])
        assert not torch.equal(few, models.sequences(task, 3, 5, part=1))
        assert not torch.equal(few, models.sequences(task, 4, 5))
    labels = models.labels_of(few, "copy")
    assert (labels[:, :31] == -100).all()
    assert torch.equal(labels[:, 31:-1], few[:, :32])
    # rows of a Dirichlet(0.1) hold a few likely tokens each
    following = models.sequences("markov", 3, 3000)
    pairs = torch.bincount((following[:, :-1] * 64 + following[:, 1:]).flatten(), minlength=64**2).view(64, 64)
    assert (pairs / pairs.sum(1, keepdim=True)).amax(1).mean() > 0.2


def test_first_seeds_come_first(script):
    scenarios, collapse = script("collapse_scenarios"), script("collapse")
    steps = {name: scenario.steps for name, scenario in scenarios.SCENARIOS.items()}
    plans = collapse.planned(list(steps), scenarios.described(steps, None))
    assert [seed for _, seed, _ in plans] == sorted(seed for _, seed, _ in plans)
    assert [plan for plan in plans if plan[0] == "healthy"] == [("healthy", seed, 1000) for seed in range(10)]
    assert {name for name, _, _ in plans} == set(scenarios.SCENARIOS)
