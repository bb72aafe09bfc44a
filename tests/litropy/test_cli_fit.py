"""``litropy fit`` and what it leaves, from the first screen to the resumed run."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from litropy.callbacks.metrics_file import read_metrics

FILES = ["config.yaml", "metrics.csv", "curves.png", "checkpoints/last.ckpt", "checkpoints/best.ckpt", "hugging_face"]
UNSTABLE = {"train/tokens_per_second", "train/peak_memory_mib"}


def metrics(folder):
    return {int(row.pop("step")): row for row in read_metrics(folder / "metrics.csv")}


def assert_same_metrics(run, reference):
    """Rows, columns and values agree; only speed and memory may differ."""
    got, expected = metrics(run), metrics(reference)
    assert list(got) == list(expected)
    for step, row in expected.items():
        names = set(row) - UNSTABLE
        assert set(got[step]) - UNSTABLE == names, step
        for name in names:
            assert got[step][name] == pytest.approx(row[name], rel=1e-3, abs=1e-5), (step, name)


@pytest.fixture(scope="module")
def reference(project):
    """An uninterrupted run, with what it printed."""
    from litropy.cli import main

    before = os.getcwd()
    os.chdir(project)
    try:
        main(["fit", "--config", "tiny.yaml", "--trainer.default_root_dir", "reference"])
    finally:
        os.chdir(before)
    return project / "reference" / "tiny" / "version_0"


def test_a_run_leaves_everything_in_one_folder(reference):
    assert [name for name in FILES if not (reference / name).exists()] == []
    assert list(reference.glob("events.out.tfevents*"))
    assert (reference / "curves.png").stat().st_size > 10_000


def test_metrics_have_a_row_for_each_step(reference):
    rows = metrics(reference)
    assert list(rows) == list(range(12))
    assert all(
        {"train/loss", "entropy/output", "train/grad_norm", "train/learning_rate"} <= set(r) for r in rows.values()
    )
    assert [step for step, row in rows.items() if "val/loss" in row] == [3, 7, 11]
    assert all("train/tokens_per_second" in row for step, row in rows.items() if step)
    assert "data/unigram_entropy" in rows[0]


def test_the_hugging_face_folder_loads(reference):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reference / "hugging_face")
    model = AutoModelForCausalLM.from_pretrained(reference / "hugging_face")
    ids = tokenizer("def return", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] == ids.shape[1] + 2


def test_screen_and_summary_say_what_matters(litropy):
    result = litropy("fit", "--config", "tiny.yaml", "--trainer.default_root_dir", "screen", "--trainer.max_steps", 4)
    assert result.code == 0
    for words in ("CPU", "32-true", "PyTorch implementation", "parameters", "64 tokens a step", "vocabulary 300"):
        assert words in result.out
    assert "unigram entropy" in result.out
    assert "screen/tiny/version_0" in result.out
    assert "step 4/4" in result.out
    summary = result.out.split("step 4/4")[-1]
    for words in ("held-out loss", "perplexity", "unigram entropy", "peak memory", "curves.png", "hugging_face"):
        assert words in summary
    # no advertising, no bars or escape codes where there is no terminal
    noise = ("litlogger", "Tip", "\x1b", "\r", "GPU available", "Seed set", "%|")
    assert not [word for word in noise if word in result.out + result.err]


def test_the_saved_config_repeats_the_run_under_its_name(litropy, project, reference):
    saved = reference / "config.yaml"
    result = litropy("fit", "--config", saved)
    assert result.code == 0
    assert_same_metrics(project / "reference" / "tiny" / "version_1", reference)
    assert (project / "reference" / "tiny" / "version_1" / "config.yaml").read_text() == saved.read_text()


def test_ctrl_c_saves_and_the_printed_command_goes_on(litropy, project, reference):
    stop = ["--trainer.callbacks+={class_path: stoppers.InterruptAt, init_args: {step: 6}}"]
    result = litropy("fit", "--config", "tiny.yaml", *stop)
    assert result.code == 130
    assert "Traceback" not in result.err
    run = project / "runs" / "tiny" / "version_0"
    assert list(metrics(run)) == list(range(6))
    command = next(line for line in result.err.splitlines() if line.strip().startswith("litropy fit"))
    assert command.endswith("--ckpt_path last")
    words = [word for word in shlex.split(command)[1:] if "stoppers" not in word]
    result = litropy(*words)
    assert result.code == 0
    assert "going on from 6" in result.out
    assert os.listdir(run.parent) == ["version_0"]
    assert_same_metrics(run, reference)


def test_ctrl_c_before_the_first_step_has_nothing_to_save(litropy):
    stop = "--trainer.callbacks+=stoppers.InterruptInSetup"
    result = litropy("fit", "--config", "tiny.yaml", stop, "--trainer.default_root_dir", "early")
    assert result.code == 130
    assert "nothing to save" in result.err


def test_a_killed_run_goes_on_and_its_extra_rows_are_replaced(litropy, project, reference):
    arguments = ["fit", "--config", "tiny.yaml", "--trainer.default_root_dir", "killed"]
    killer = "--trainer.callbacks+={class_path: stoppers.DieAt, init_args: {step: 11}}"
    command = [sys.executable, "-m", "litropy", *arguments, killer]
    result = subprocess.run(command, cwd=project, env=os.environ | {"PYTHONPATH": str(project)}, capture_output=True)
    assert result.returncode == 9
    run = project / "killed" / "tiny" / "version_0"
    assert list(metrics(run)) == list(range(10))
    assert litropy(*arguments, "--ckpt_path", "last").code == 0
    assert_same_metrics(run, reference)


def test_a_finished_run_can_be_prolonged(litropy, project):
    arguments = ["fit", "--config", "tiny.yaml", "--trainer.default_root_dir", "longer", "--model.schedule", "constant"]
    assert litropy(*arguments, "--trainer.max_steps", 5).code == 0
    assert litropy(*arguments, "--trainer.max_steps", 9, "--ckpt_path", "last").code == 0
    run = project / "longer" / "tiny" / "version_0"
    assert litropy(*arguments, "--trainer.max_steps", 9).code == 0
    assert_same_metrics(run, project / "longer" / "tiny" / "version_1")


def test_resuming_another_model_is_a_short_error(litropy, reference):
    result = litropy(
        "fit",
        "--config",
        "tiny.yaml",
        "--model.config.hidden_size",
        24,
        "--ckpt_path",
        reference / "checkpoints/last.ckpt",
    )
    assert result.code == 1
    assert "hidden_size" in result.err
    assert "Traceback" not in result.err
    assert len(result.err.splitlines()) < 10


def test_an_error_in_training_is_short_and_debug_shows_all(litropy):
    arguments = ["fit", "--config", "tiny.yaml", "--trainer.callbacks+=stoppers.FailAt", "--trainer.logger=false"]
    result = litropy(*arguments)
    assert result.code == 1
    assert result.err.startswith("litropy: error: the answer is 41; it must be 42.")
    assert "Traceback" not in result.err
    with pytest.raises(ValueError, match="41"):
        litropy(*arguments, debug=True)


def test_no_logger_leaves_no_run_folder(litropy, project):
    result = litropy(
        "fit",
        "--config",
        "tiny.yaml",
        "--trainer.logger=false",
        "--trainer.max_steps=2",
        "--trainer.default_root_dir=no",
    )
    assert result.code == 0
    assert not (project / "no").exists()


def test_another_logger_replaces_tensorboard_and_keeps_metrics(litropy, project):
    logger = "--trainer.logger={class_path: lightning.pytorch.loggers.logger.DummyLogger}"
    result = litropy(
        "fit", "--config", "tiny.yaml", logger, "--trainer.max_steps=2", "--trainer.default_root_dir=other"
    )
    assert result.code == 0
    run = project / "other" / "tiny" / "version_0"
    assert list(metrics(run)) == [0, 1]
    assert not list(run.glob("events.out*"))


def test_validate_and_test_use_the_last_checkpoint(litropy, reference):
    arguments = [
        "--config",
        "tiny.yaml",
        "--trainer.default_root_dir",
        "reference",
        "--ckpt_path",
        reference / "checkpoints/last.ckpt",
    ]
    before = (reference / "metrics.csv").read_bytes()
    expected = metrics(reference)[11]["val/loss"]
    result = litropy("validate", *arguments)
    assert result.code == 0
    assert float(re.search(r"val/loss +│ +([\d.]+)", result.out)[1]) == pytest.approx(expected, rel=1e-6)
    assert litropy("test", *arguments).code == 0
    assert (reference / "metrics.csv").read_bytes() == before


def test_predict_prints_prompt_and_completion(litropy, reference):
    result = litropy(
        *("predict", "--config", "tiny.yaml", "--trainer.default_root_dir", "reference"),
        *("--ckpt_path", "last", "--data.prompts", '["def return", "import"]'),
    )
    assert result.code == 0, result.err
    first, second = result.out.split("\n---\n")
    assert first.startswith("def return")
    assert second.startswith("import")
    assert len(first.removesuffix("\n")) > len("def return")
