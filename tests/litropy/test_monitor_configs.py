"""Fragments for a second --config: each adds its callbacks to a run that knows nothing of them."""

import csv
import re
import shlex

import pytest
import yaml

from litropy.config_files import find_config, packaged_configs

FRAGMENTS = {name: path for name, path in packaged_configs().items() if name.startswith("monitor/")}
WATCHED = {
    "entropy/attention/layer_0",
    "entropy/output_top10_mass",
    "representation/effective_rank/layer_0",
    "collapse/alarm",
}


def overrides(path):
    """Arguments of all overrides of a fragment's header; those of options stand before other fragments."""
    text = "\n".join(line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#"))
    lines = text.partition("Overrides:")[2].splitlines()
    return [word for line in lines for word in shlex.split(re.sub(r"\s\(.*$", "", line))]


def class_names(callbacks):
    return [entry if isinstance(entry, str) else entry["class_path"] for entry in callbacks]


def test_the_fragments_are_listed(litropy):
    listed = litropy("configs", "list").out
    assert "monitor/watch_entropy.yaml" in FRAGMENTS
    assert all(name in listed for name in FRAGMENTS)


@pytest.mark.parametrize("name", FRAGMENTS)
def test_it_is_built_into_the_quickstart_with_its_overrides(name, project, monkeypatch):
    from litropy.lightning_cli import CommandLine

    monkeypatch.chdir(project)
    words = ["--config", "quickstart/pretrain_cpu.yaml", "--config", name, *overrides(FRAGMENTS[name])]
    for index, word in enumerate(words):
        words[index] = str(find_config(word)) if words[index - 1] == "--config" else word
    built = CommandLine(["fit", *words], run=False)
    wanted = class_names(yaml.safe_load(FRAGMENTS[name].read_text())["trainer"]["callbacks+"])
    assert wanted == [type(callback).__name__ for callback in built.trainer.callbacks][: len(wanted)]
    assert built.trainer.max_steps == 180


def test_a_run_is_watched(litropy, tmp_path):
    added = ["watch_entropy", "attention_entropy_floor", "qk_clip"]
    result = litropy(
        *("fit", "--config", "tiny.yaml", *(word for name in added for word in ("--config", f"monitor/{name}.yaml"))),
        *("--trainer.default_root_dir", tmp_path, "--data.cache_dir", tmp_path / "cache"),
    )
    assert result.code == 0, result.err
    run = tmp_path / "tiny" / "version_0"
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(rows[-1]) >= {*WATCHED, "entropy_regularizer/penalty", "qk_clip/max_logit"}
    assert [float(row["collapse/alarm"]) for row in rows if row["collapse/alarm"]] == [0.0] * 12
    assert (run / "curves.png").is_file()
    assert list((run / "attention_entropy").glob("step_*.npz"))
