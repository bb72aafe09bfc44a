import os

import pytest

from litropy.run_folder import LAST_CHECKPOINT, config_name, next_version, run_of_last_checkpoint, without_option


def run(folder, version, age=None):
    path = folder / f"version_{version}" / LAST_CHECKPOINT
    path.parent.mkdir(parents=True)
    if age is not None:
        path.write_bytes(b"x")
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
    return path


@pytest.mark.parametrize(
    ("configs", "name"),
    [
        ([], "LanguageModel"),
        (["mine.yaml"], "mine"),
        (["a/b/pretrain.v2.yaml", "other.yaml"], "pretrain.v2"),
        (["runs/mine/version_12/config.yaml"], "mine"),
        (["config.yaml"], "config"),
    ],
)
def test_runs_are_named_after_the_first_config(configs, name):
    assert config_name(configs, "LanguageModel") == name


def test_versions_are_never_reused(tmp_path):
    assert next_version(tmp_path / "new") == 0
    for version in (0, 2, 10):
        run(tmp_path, version)
    (tmp_path / "version_x").mkdir()
    (tmp_path / "version_99").write_text("a file")
    assert next_version(tmp_path) == 11


def test_the_newest_checkpoint_wins_not_the_highest_version(tmp_path):
    run(tmp_path, 0, age=50)
    newest = run(tmp_path, 1, age=10)
    run(tmp_path, 2, age=30)
    run(tmp_path, 3)
    assert run_of_last_checkpoint(tmp_path) == (1, newest)


def test_a_sharded_checkpoint_is_as_new_as_its_files(tmp_path):
    run(tmp_path, 0, age=10)
    sharded = run(tmp_path, 1)
    sharded.mkdir()
    (sharded / "shard").write_bytes(b"x")
    os.utime(sharded / "shard", (2_000_000, 2_000_000))
    os.utime(sharded, (0, 0))
    assert run_of_last_checkpoint(tmp_path) == (1, sharded)


def test_no_checkpoint_is_an_error_that_says_where(tmp_path):
    run(tmp_path, 0)
    with pytest.raises(ValueError, match=r"--ckpt_path last: no run in .* Leave --ckpt_path out"):
        run_of_last_checkpoint(tmp_path)


def test_an_option_is_removed_with_its_value():
    argv = ["fit", "--ckpt_path", "a", "-c", "x.yaml", "--ckpt_path=b", "--model.ckpt_path_like", "1"]
    assert without_option(argv, "--ckpt_path") == ["fit", "-c", "x.yaml", "--model.ckpt_path_like", "1"]
