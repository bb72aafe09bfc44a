import pytest

from litropy.config_files import check_yaml, config_table, copy_config, find_config, packaged_configs


def test_a_packaged_config_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = find_config("quickstart/pretrain_cpu.yaml")
    assert path == packaged_configs()["quickstart/pretrain_cpu.yaml"]
    assert find_config("quickstart/pretrain_cpu") == path


def test_a_file_in_the_current_folder_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "quickstart" / "pretrain_cpu.yaml"
    mine.parent.mkdir()
    mine.write_text("model: {}")
    assert find_config("quickstart/pretrain_cpu.yaml").resolve() == mine


@pytest.mark.parametrize("name", ["pretrain_cpu.yaml", "quickstart/pretrain_cpuu.yaml", "quickstart/pretrain_cp"])
def test_an_unknown_config_names_the_nearest(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"Did you mean quickstart/pretrain_cpu(\.yaml)?\?"):
        find_config(name)


def test_the_table_has_a_purpose_for_each_config():
    lines = config_table().splitlines()
    assert len(lines) == len(packaged_configs()) > 0
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)


def test_a_copy_never_overwrites(tmp_path):
    copy = copy_config("quickstart/pretrain_cpu.yaml", str(tmp_path / "new" / "mine.yaml"))
    assert copy.read_text() == find_config("quickstart/pretrain_cpu.yaml").read_text()
    assert copy_config("quickstart/pretrain_cpu.yaml", str(tmp_path)) == tmp_path / "pretrain_cpu.yaml"
    with pytest.raises(ValueError, match="exists already"):
        copy_config("quickstart/pretrain_cpu.yaml", str(copy))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  a: [1, 2\n", r"line 3, column 1"),
        ("model:\n\ta: 1\n", r"line 2"),
        ("", "no options"),
        ("just words", "no options"),
    ],
)
def test_broken_yaml_is_reported_with_its_place(text, message, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"broken\.yaml.*{message}"):
        check_yaml(path)
