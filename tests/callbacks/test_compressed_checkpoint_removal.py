"""While checkpoints are written in another thread, one is always there."""

import threading

import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from litropy.callbacks.checkpoint_format import load_file
from litropy.callbacks.compressed_checkpoint_io import CompressedCheckpointIO
from litropy.callbacks.compressed_checkpoint_removal import Removals


def in_a_thread(function, *arguments):
    thread = threading.Thread(target=function, args=arguments)
    thread.start()
    thread.join()


def test_saving_in_the_same_thread_removes_at_once(tmp_path):
    removals = Removals(lambda path: path.unlink())
    removals.saving()
    (tmp_path / "a").write_text("")
    removals.committed(tmp_path / "a")
    removals.remove(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_only_checkpoint_stays_until_the_next_is_there(tmp_path):
    removals = Removals(lambda path: path.unlink())
    (tmp_path / "a").write_text("")
    in_a_thread(lambda: (removals.saving(), removals.committed(tmp_path / "a")))
    removals.remove(tmp_path / "a")
    removals.remove(tmp_path / "b")  # not written yet
    assert (tmp_path / "a").exists()
    (tmp_path / "b").write_text("")
    in_a_thread(removals.committed, tmp_path / "b")
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "b").exists()
    (tmp_path / "c").write_text("")
    in_a_thread(removals.committed, tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_under_lightnings_plugin(tmp_path, monkeypatch):
    plugin = CompressedCheckpointIO()
    outer = AsyncCheckpointIO(plugin)
    go_on, begun = threading.Event(), threading.Event()
    save = plugin.save_checkpoint

    def slow(checkpoint, path, storage_options=None):
        if path.name == "b":
            begun.set()
            assert go_on.wait(20)
        save(checkpoint, path, storage_options)

    monkeypatch.setattr(plugin, "save_checkpoint", slow)
    weights = torch.ones(3)
    outer.save_checkpoint({"w": weights}, tmp_path / "a")
    outer.save_checkpoint({"w": weights}, tmp_path / "b")
    weights.zero_()  # training goes on
    assert begun.wait(20)
    outer.remove_checkpoint(tmp_path / "a")
    assert torch.equal(load_file(tmp_path / "a")["w"], torch.ones(3))
    go_on.set()
    outer.teardown()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert torch.equal(load_file(tmp_path / "b")["w"], torch.ones(3))
