import csv

import pytest

from litropy.callbacks.metrics_file import MetricsFile, MetricsTable, read_metrics


def table(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_values_of_a_step_share_a_row_and_columns_may_come_later(tmp_path):
    metrics = MetricsTable(tmp_path)
    metrics.log_metrics({"train/loss": 2.0}, 0)
    metrics.save()
    metrics.log_metrics({"train/loss": 1.5}, 1)
    metrics.save()
    metrics.log_metrics({"val/loss": 1.75}, 1)
    metrics.save()
    assert table(tmp_path / "metrics.csv") == [["step", "train/loss", "val/loss"], ["0", "2", ""], ["1", "1.5", "1.75"]]


def test_rows_are_appended_and_not_written_anew(tmp_path):
    metrics = MetricsTable(tmp_path)
    metrics.log_metrics({"a": 0.0}, 0)
    metrics.save()
    file = (tmp_path / "metrics.csv").stat().st_ino
    for step in range(1, 5):
        metrics.log_metrics({"a": float(step)}, step)
        metrics.save()
    # writing anew replaces the file
    assert (tmp_path / "metrics.csv").stat().st_ino == file
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == [0, 1, 2, 3, 4]


def test_a_continued_run_appends_and_drops_what_the_killed_one_logged_later(tmp_path):
    first = MetricsFile(tmp_path, "mine", 0)
    for step in range(6):
        first.log_metrics({"train/loss": float(step), "old": 1.0}, step)
    first.save()
    second = MetricsFile(tmp_path, "mine", 0)
    second.continue_at(4)
    second.log_metrics({"train/loss": 40.0, "new": 2.0}, 4)
    second.save()
    rows = read_metrics(tmp_path / "mine" / "version_0" / "metrics.csv")
    assert [row["train/loss"] for row in rows] == [0, 1, 2, 3, 40]
    assert "old" not in rows[-1]
    assert rows[-1]["new"] == 2


def test_a_line_cut_off_in_the_middle_is_dropped(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,a,b\n0,1,2\n1,3,4\n2,5e")
    metrics = MetricsTable(tmp_path)
    metrics.log_metrics({"a": 9.0}, 2)
    metrics.save()
    assert table(tmp_path / "metrics.csv") == [["step", "a", "b"], ["0", "1", "2"], ["1", "3", "4"], ["2", "9", ""]]


def test_floats_survive_with_nine_digits(tmp_path):
    metrics = MetricsTable(tmp_path)
    metrics.log_metrics({"a": 1 / 3, "b": float("nan"), "c": 123456789.0}, 0)
    metrics.save()
    row = read_metrics(tmp_path / "metrics.csv")[0]
    assert row["a"] == pytest.approx(1 / 3, rel=1e-8)
    assert row["b"] != row["b"]
    assert row["c"] == 123456789
