"""Fragments that put one method into its slot: each builds into an RLVR run, with its overrides."""

import re
import shlex

import pytest
import yaml
from jsonargparse import ActionConfigFile
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser

from litropy.config_files import find_config, packaged_configs
from litropy.recipes import RLVR, steering
from litropy.recipes.steering.slots import Component

FRAGMENTS = {name: path for name, path in packaged_configs().items() if name.startswith("steering/")}
BASE = {"model": {"class_path": "RLVR", "init_args": {"config": {"model_type": "llama"}}}}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Parses words behind a config of an RLVR model, and builds the model."""
    base = tmp_path_factory.mktemp("configs") / "rlvr.yaml"
    base.write_text(yaml.safe_dump(BASE))
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    return lambda words: parser.instantiate_classes(parser.parse_args(["--config", str(base), *words])).model


def overrides(path):
    """Arguments of the overrides in a fragment's header, one list each."""
    text = "\n".join(line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#"))
    lines = text.partition("Overrides:")[2].strip().splitlines()
    found = [shlex.split(re.sub(r"\s\(.*$", "", line)) for line in lines]
    return [[word if word.startswith("--") else known(word) for word in words] for words in found]


def known(word):
    return str(find_config(word)) if word.endswith(".yaml") else word


def class_names(value):
    """Names of all classes in a fragment."""
    if isinstance(value, dict):
        own = [value["class_path"]] if "class_path" in value else []
        return own + [name for inner in value.values() for name in class_names(inner)]
    if isinstance(value, list):
        return [name for inner in value for name in class_names(inner)]
    return [value] if isinstance(value, str) and hasattr(steering, value) else []


def built_names(model):
    found = []

    def look(component):
        found.append(type(component).__name__)
        for inner in vars(component).values():
            if isinstance(inner, Component):
                look(inner)

    for component in model._components().values():
        look(component)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FRAGMENTS)
def test_it_builds_with_its_overrides(name, build):
    words = ["--config", str(FRAGMENTS[name])]
    model = build(words)
    assert isinstance(model, RLVR)
    wanted = class_names(yaml.safe_load(FRAGMENTS[name].read_text()))
    assert wanted
    assert set(wanted) <= set(built_names(model))
    extra = overrides(FRAGMENTS[name])
    assert len(extra) == 2
    build([*words, *(word for each in extra for word in each)])


def test_every_method_has_a_fragment():
    text = "\n".join(path.read_text() for path in FRAGMENTS.values())
    plain = {"SequenceMean"}  # the default, which no paper's method needs to be named with
    assert {name for name in steering.__all__ if not re.search(rf"\b{name}\b", text)} == plain
