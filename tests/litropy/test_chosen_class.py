"""A class that a config chooses has its own defaults, not those of the class that it takes the place of."""

import pytest

from litropy.chosen_class import chosen_class
from litropy.lightning_cli import CommandLine


def test_the_last_choice_counts(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("model: {class_path: RLVR}\ndata: TaskDataModule\n")
    second.write_text("model: {init_args: {seed: 3}}\n")
    files = ["fit", "--config", str(first), f"--config={second}"]
    assert chosen_class(files, "model", "X") == "RLVR"
    assert chosen_class(files, "data", "X") == "TaskDataModule"
    assert chosen_class([*files, "--model=LanguageModel"], "model", "X") == "LanguageModel"
    assert chosen_class(["fit", "--model.seed", "3"], "model", "X") == "X"
    assert chosen_class(["fit", "--config", str(tmp_path / "none.yaml")], "model", "X") == "X"


@pytest.mark.parametrize("way", ["option", "file"])
def test_defaults_are_those_of_the_chosen_class(tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    chosen = ["--model", "RLVR", "--data", "TaskDataModule"]
    if way == "file":
        (tmp_path / "run.yaml").write_text("model: {class_path: RLVR}\ndata: {class_path: TaskDataModule}\n")
        chosen = ["--config", "run.yaml"]
    command = CommandLine(["fit", *chosen, "--model.config", "{model_type: llama}"], run=False)
    model = command.config["fit"].model
    assert model.class_path == "litropy.recipes.RLVR"
    assert (model.init_args.weight_decay, model.init_args.learning_rate, model.init_args.schedule) == (
        0.0,
        1e-6,
        "constant",
    )
