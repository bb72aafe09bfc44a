"""A file's name always holds something whole: killed writers, full disks, two writers, read-only folders."""

import errno
import os
import random
import signal
import time

import pytest
import torch

from litropy.callbacks.checkpoint_atomic import atomic_write
from litropy.callbacks.checkpoint_format import load_file, save_file


def forked(function):
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)
            function()
        finally:
            os._exit(1)
    return child


def test_a_writer_that_is_killed_at_any_time_leaves_a_whole_file(tmp_path):
    path = tmp_path / "last.ckpt"
    save_file({"t": torch.zeros(200_000)}, path)
    times = random.Random(0)

    def write_on():
        for count in range(1, 10_000):
            save_file({"t": torch.full((200_000,), float(count))}, path, codec="raw")

    for _ in range(8):
        child = forked(write_on)
        time.sleep(times.uniform(0.01, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        values = load_file(path)["t"]
        assert torch.equal(values, values[:1].expand(200_000))
    # what they left behind goes with the next save
    save_file({"t": torch.ones(3)}, path)
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_two_writers_of_one_path(tmp_path):
    path = tmp_path / "last.ckpt"
    save_file({"t": torch.zeros(50_000)}, path)

    def write_on(value):
        while True:
            save_file({"t": torch.full((50_000,), value)}, path, codec="raw")

    children = [forked(lambda value=value: write_on(value)) for value in (1.0, 2.0)]
    try:
        seen = set()
        end = time.monotonic() + 20
        while not {1.0, 2.0} <= seen and time.monotonic() < end:
            values = load_file(path)["t"]
            assert torch.equal(values, values[:1].expand(50_000))
            seen.add(values[0].item())
        assert {1.0, 2.0} <= seen
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_earlier_file(tmp_path, monkeypatch, call):
    path = tmp_path / "last.ckpt"
    save_file({"t": torch.ones(3)}, path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(
        OSError, match=r"last\.ckpt could not be written: No space left on device\. An earlier"
    ) as error:
        save_file({"t": torch.zeros(3)}, path)
    assert error.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert torch.equal(load_file(path)["t"], torch.ones(3))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"last\.ckpt could not be written"):
        save_file({"t": torch.ones(3)}, tmp_path / "file" / "last.ckpt")
    folder = tmp_path / "read only"
    folder.mkdir()
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(PermissionError, match="could not be written: Permission denied"):
        save_file({"t": torch.ones(3)}, folder / "last.ckpt")


def test_everything_is_on_disk_before_the_file_takes_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, f=function, n=name: calls.append(n) or f(*a))
    with atomic_write(tmp_path / "x") as file:
        file.write(b"1")
        assert not (tmp_path / "x").exists()
    assert calls == ["fsync", "replace", "fsync"], "the file, its name, the folder"
    assert (tmp_path / "x").read_bytes() == b"1"


def test_a_writer_that_is_still_alive_keeps_its_file(tmp_path):
    with atomic_write(tmp_path / "slow") as slow:
        slow.write(b"1")
        with atomic_write(tmp_path / "quick") as quick:
            quick.write(b"2")
        slow.write(b"1")
    assert (tmp_path / "slow").read_bytes() == b"11"
    assert sorted(os.listdir(tmp_path)) == ["quick", "slow"]
