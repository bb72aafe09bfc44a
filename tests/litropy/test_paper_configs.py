"""The papers' whole recipes: each builds model, data and trainer, and nothing in it works against itself."""

import re
import shlex

import pytest
import yaml

from litropy.config_files import find_config, packaged_configs
from litropy.recipes import RLVR, steering
from litropy.recipes.steering.guard import explain

PAPERS = {name: path for name, path in packaged_configs().items() if name.startswith("papers/")}
HERE = ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]


def build(name, words=()):
    """Model, data and trainer of a config; nothing is downloaded or computed."""
    from litropy.lightning_cli import CommandLine

    words = ["--config", name, *words]
    for index, word in enumerate(words):
        words[index] = str(find_config(word)) if words[index - 1] == "--config" else word
    return CommandLine(["fit", *words, *HERE], run=False)


def overrides(path):
    """Arguments of the overrides in a config's header, one list each."""
    text = "\n".join(line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#"))
    lines = text.partition("Overrides:")[2].strip().splitlines()
    return [shlex.split(re.sub(r"\s\(.*$", "", line)) for line in lines]


def methods_in(value):
    """Names of the methods that a config puts into slots."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return {name for each in inner for name in methods_in(each)}
    return {value} & set(steering.__all__) if isinstance(value, str) else set()


@pytest.mark.parametrize("name", PAPERS)
def test_a_paper_is_built(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    built = build(name)
    written = yaml.safe_load(PAPERS[name].read_text())["model"]["init_args"]
    numbers = {key: value for key, value in written.items() if isinstance(value, int | float)}
    assert {key: getattr(built.model, key) for key in numbers} == numbers
    if isinstance(built.model, RLVR):
        found = {type(component).__name__ for component in built.model._components().values()}
        assert methods_in(written) <= found
        one_update = built.model.mini_batch_size is None and built.model.epochs == 1
        assert explain(built.model.methods, built.model.sampler, one_update) == []


def test_the_recipe_for_one_gpu_is_built(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    built = build("recipes/rlvr_qwen2p5_1p5b.yaml")
    assert isinstance(built.model, RLVR)
    assert built.model.engine.max_rows == built.datamodule.batch_size * built.model.group_size == 256
    assert (built.model.methods.clip.low, built.model.methods.clip.high) == (0.2, 0.28)
    assert explain(built.model.methods, built.model.sampler, one_update=False) == []
    words = overrides(packaged_configs()["recipes/rlvr_qwen2p5_1p5b.yaml"])
    words = [word for each in words for word in each] + ["--config", "steering/skywork.yaml"]
    steered = build("recipes/rlvr_qwen2p5_1p5b.yaml", words)
    assert [type(regulariser).__name__ for regulariser in steered.model.methods.regularisers] == ["EntropyBonus"]
    assert (steered.model.engine.max_rows, steered.model.micro_batch_size) == (128, 8)


@pytest.mark.filterwarnings("ignore")
def test_the_overrides_of_the_papers_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, path in PAPERS.items():
        words = overrides(path)
        assert len(words) == 2
        build(name, [word for each in words for word in each])


def test_every_paper_is_there():
    wanted = {"dapo", "entropy_mechanism", "hapo", "siren", "steer", "forking_tokens", "ulorl", "confucius3", "pear"}
    assert set(PAPERS) == {f"papers/{name}.yaml" for name in wanted | {"ares", "light_if", "light_if_sft"}}
