"""The command line without training: help, configs, options and mistakes."""

import subprocess
import sys

import pytest
import yaml

from litropy.parse_errors import shorten


def test_light_commands_do_not_import_torch():
    code = (
        "import sys; from litropy.cli import main\n"
        "for argv in ('--version', '--help', 'fit --help', 'configs', 'configs show debug/overfit.yaml'):\n"
        "    main(argv.split())\n"
        "heavy = {'torch', 'lightning', 'transformers', 'jsonargparse', 'numpy'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "litropy 0." in result.stdout


def test_main_help_is_one_screen(litropy):
    result = litropy("--help")
    assert result.code == 0
    assert len(result.out.splitlines()) <= 24
    for command in ("fit", "validate", "test", "predict", "configs"):
        assert f"  {command} " in result.out
    assert litropy().out == result.out


def test_the_help_of_a_command_shows_the_options_of_model_and_data(litropy):
    out = litropy("fit", "--help").out
    for words in ("--ckpt_path", "max_steps", "learning_rate", "sequence_length", "litropy fit --config"):
        assert words in out
    assert max(map(len, out.splitlines())) <= 110
    assert "Lightning Trainer command line tool" not in out


def test_configs_show_and_copy(litropy, project):
    assert "quickstart/pretrain_cpu.yaml" in litropy("configs").out
    assert litropy("configs", "show", "debug/overfit.yaml").out.startswith("# ")
    assert "Wrote copies/overfit.yaml" in litropy("configs", "copy", "debug/overfit.yaml", "copies").out
    assert (project / "copies" / "overfit.yaml").is_file()
    assert litropy("configs", "show", "debug/overfitt.yaml").code == 2


def test_print_config_gives_a_config_that_parses_again(litropy, project):
    result = litropy("fit", "--config", "tiny.yaml", "--print_config")
    assert result.code == 0
    config = yaml.safe_load(result.out)
    assert config["model"]["class_path"].endswith("LanguageModel")
    assert config["data"]["init_args"]["vocab_size"] == 300
    (project / "again.yaml").write_text(result.out)
    again = litropy("fit", "--config", "again.yaml", "--print_config").out
    assert yaml.safe_load(again) == config


def test_a_fragment_appends_to_a_list_and_replaces_a_value(litropy, project):
    (project / "first.yaml").write_text("trainer:\n  max_steps: 3\n  callbacks:\n  - class_path: LearningRateMonitor\n")
    (project / "second.yaml").write_text("trainer:\n  max_steps: 4\n  callbacks+:\n  - class_path: ModelSummary\n")
    out = litropy("fit", "-c", "tiny.yaml", "-c", "first.yaml", "-c", "second.yaml", "--print_config").out
    trainer = yaml.safe_load(out)["trainer"]
    assert trainer["max_steps"] == 4
    assert [c["class_path"].rpartition(".")[2] for c in trainer["callbacks"]] == ["LearningRateMonitor", "ModelSummary"]


MISTAKES = [
    (["fti"], "There is no command 'fti'. Did you mean fit?"),
    (["fit", "--config", "tinny.yaml"], "There is no config 'tinny.yaml'"),
    (["fit", "--config", "quickstart/pretrain_cpuu.yaml"], "Did you mean quickstart/pretrain_cpu.yaml?"),
    (["fit", "--config", "tiny.yaml", "--trainer.max_step", "3"], "Did you mean --trainer.max_steps?"),
    (["fit", "--config", "tiny.yaml", "--model.learning_rat", "3"], "Did you mean learning_rate?"),
    (["fit", "--config", "tiny.yaml", "--data.sequence_len", "3"], "Did you mean sequence_length?"),
    (["fit", "--config", "tiny.yaml", "--model", "LanguageModle"], "Did you mean LanguageModel?"),
    (["fit", "--config", "tiny.yaml", "--trainer.callbacks+=EarlyStoping"], "Did you mean EarlyStopping?"),
    (["fit", "--config", "tiny.yaml", "--trainer.max_steps", "many"], "trainer.max_steps: expected int, got 'many'"),
    (["fit", "--config", "tiny.yaml", "--model.learning_rate", "x"], "model.learning_rate: expected float, got 'x'"),
    (["fit", "--config", "tiny.yaml", "nonsense"], "options start with --"),
    (
        ["fit", "--config", "tiny.yaml", "--ckpt_path", "last", "--trainer.default_root_dir=none"],
        "--ckpt_path last: no run",
    ),
    (["validate", "--config", "tiny.yaml", "--ckpt_path", "gone.ckpt"], "there is no checkpoint 'gone.ckpt'"),
    (["configs", "lst"], "not understood"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), MISTAKES, ids=[" ".join(arguments[-2:]) for arguments, _ in MISTAKES]
)
def test_mistakes_get_a_short_answer(litropy, arguments, message):
    result = litropy(*arguments)
    assert result.code in (1, 2)
    assert message in result.err
    assert len(result.err.splitlines()) <= 8
    assert not [word for word in ("usage: litropy fit", "Traceback", "Union", "Namespace(") if word in result.err]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer:\n  max_step: 3\n", "Did you mean trainer.max_steps?"),
        ("trainr:\n  max_steps: 3\n", "Did you mean trainer.max_steps?"),
        ("model:\n  learning_rat: 3\n", "Did you mean learning_rate?"),
        ("model: [1\n", "config.yaml, line 2"),
        (
            "trainer:\n  callbacks:\n  - class_path: EarlyStopping\n    init_args: {monitor: x, patienc: 3}\n",
            "mean patience?",
        ),
    ],
)
def test_mistakes_in_a_config_get_a_short_answer(litropy, tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    result = litropy("fit", "--config", path)
    assert result.code == 2
    assert message in result.err
    assert len(result.err.splitlines()) <= 4


def test_errors_of_the_program_stay_as_they_are():
    assert shorten("`width` is 3; it must be even.") == "`width` is 3; it must be even."
