"""Every packaged config parses through the real command line and says what it is for."""

import re

import pytest
import yaml

from litropy.config_files import packaged_configs
from litropy.help_pages import documented_arguments

ALL = packaged_configs()
# others have tests of their own: test_monitor_configs.py and so on
OTHERS = ("monitor/", "checkpoint/", "steering/", "papers/")
CONFIGS = {name: path for name, path in ALL.items() if not name.startswith(OTHERS)}
FIELDS = {
    "Hardware": r"(second|minute)",
    "Expect": r"(loss|entropy)",
    "Command": r"litropy fit (--config quickstart/(pretrain|rlvr)_cpu\.yaml )?--config {name}$",
    "Overrides": r"--",
}
MODULES = {
    "LanguageModel": "litropy.recipes.language_model",
    "RLVR": "litropy.recipes.rlvr",
    "TextDataModule": "litropy.recipes.text_data",
    "TaskDataModule": "litropy.recipes.task_data",
}
DEFAULTS = {"model": "LanguageModel", "data": "TextDataModule"}


def chosen(config, key):
    """Name and options of the class that a config chooses for the model or the data."""
    section = config[key]
    return (section["class_path"], section["init_args"]) if "class_path" in section else (DEFAULTS[key], section)


def header(path):
    return [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]


def test_the_promised_configs_are_there():
    assert set(CONFIGS) >= {
        "quickstart/pretrain_cpu.yaml",
        "quickstart/sft_cpu.yaml",
        "quickstart/collapse_cpu.yaml",
        "quickstart/export_cpu.yaml",
        "quickstart/rlvr_cpu.yaml",
        "recipes/pretrain_qwen3_0p6b.yaml",
        "recipes/pretrain_qwen3_0p6b_fsdp2.yaml",
        "recipes/rlvr_qwen2p5_1p5b.yaml",
        "debug/overfit.yaml",
        "debug/profile.yaml",
    }


@pytest.mark.parametrize("name", ALL)
def test_the_header_has_purpose_hardware_expectation_command_and_overrides(name):
    lines = header(ALL[name])
    assert lines[0].endswith(".") or lines[0].endswith("?") or lines[0].count(".")
    text = "\n".join(lines)
    for field, pattern in FIELDS.items():
        match = re.search(rf"^{field}:\s*(.*)$", text, re.MULTILINE)
        assert match, field
        assert re.search(pattern.format(name=re.escape(name)), match[1]), field
    overrides = text[text.index("Overrides:") :].splitlines()
    assert len([line for line in overrides if "--" in line]) == 2
    assert all(len(line) <= 125 for line in ALL[name].read_text().splitlines())


@pytest.mark.parametrize("name", CONFIGS)
def test_it_parses_through_the_command_line(name, litropy):
    result = litropy("fit", "--config", name, "--print_config")
    assert result.code == 0, result.err
    parsed = yaml.safe_load(result.out)
    written = yaml.safe_load(CONFIGS[name].read_text())
    assert parsed["trainer"]["max_steps"] == written["trainer"]["max_steps"]
    numbers = {key: value for key, value in chosen(written, "data")[1].items() if not isinstance(value, dict)}
    assert parsed["data"]["init_args"].items() >= numbers.items()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_overrides_of_its_header_parse(name, litropy):
    text = "\n".join(header(CONFIGS[name]))
    lines = text[text.index("Overrides:") :].removeprefix("Overrides:").splitlines()
    for line in filter(None, map(str.strip, lines)):
        words = [word.strip("'") for word in re.sub(r"\(.*\)", "", line).split()]
        first = [] if words[0] == "--config" else ["--config", name]
        assert litropy("fit", *first, *words, "--print_config").code == 0, line


@pytest.mark.parametrize("name", CONFIGS)
def test_it_repeats_no_defaults(name):
    config = yaml.safe_load(CONFIGS[name].read_text())
    for key in DEFAULTS:
        cls, options = chosen(config, key)
        documented = documented_arguments(MODULES[cls], cls)
        for option, value in options.items():
            assert f"(default: {value})" not in documented[option], f"{key}.{option}"


@pytest.mark.parametrize("name", ["quickstart/pretrain_cpu.yaml", "quickstart/sft_cpu.yaml"])
def test_a_shortened_quickstart_trains(name, litropy, tmp_path):
    result = litropy(
        *(
            "fit",
            "--config",
            name,
            "--trainer.max_steps",
            3,
            "--trainer.val_check_interval",
            3,
            "--model.warmup_steps",
            1,
        ),
        *(
            "--trainer.limit_val_batches",
            1,
            "--data.max_documents",
            60,
            "--data.batch_size",
            2,
            "--data.vocab_size",
            500,
        ),
        *("--data.val_fraction", 0.2, "--data.cache_dir", tmp_path / "cache", "--trainer.default_root_dir", tmp_path),
    )
    assert result.code == 0, result.err
    run = next(tmp_path.glob("*_cpu/version_0"))
    assert (run / "hugging_face" / "config.json").is_file()
    assert "unigram entropy" in result.out


def test_one_batch_is_learnt_by_heart(litropy, tmp_path):
    result = litropy(
        *("fit", "--config", "debug/overfit.yaml", "--trainer.default_root_dir", tmp_path),
        *("--data.cache_dir", tmp_path / "cache", "--trainer.log_every_n_steps", 20),
    )
    assert result.code == 0, result.err
    loss = float(re.search(r"train loss +([\d.]+) nats", result.out)[1])
    assert loss < 0.1
