"""Training with compressed checkpoints: the same checkpoints, names and rules, and the same run after a crash."""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from litropy.callbacks.checkpoint_format import open_file, save_file
from litropy.callbacks.compressed_checkpoint_io import CompressedCheckpointIO, refuse_sharded
from litropy.callbacks.compressed_checkpoint_loading import is_torch_file, load_from_checkpoint
from litropy.trainer_callbacks import trainer_callbacks

SCRIPT = Path(__file__).with_name("compressed_runs.py")
# no package, so that no folder of tests hides one of ours
_spec = importlib.util.spec_from_file_location("compressed_runs", SCRIPT)
compressed_runs = importlib.util.module_from_spec(_spec)
sys.modules["compressed_runs"] = compressed_runs
_spec.loader.exec_module(compressed_runs)
Tiny, trainer_for = compressed_runs.Tiny, compressed_runs.trainer_for
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def assert_same(left, right, path="checkpoint"):
    assert type(left) is type(right), path
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, path
        assert left.shape == right.shape, path
        assert left.numpy().tobytes() == right.numpy().tobytes(), path
    elif isinstance(left, dict):
        assert list(left) == list(right), path
        for key in left:
            assert_same(left[key], right[key], f"{path}/{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{path}/{index}")
    else:
        assert repr(left) == repr(right), path


class Both(CompressedCheckpointIO):
    """Also keeps what torch.save would have written."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, path, storage_options)
        TorchCheckpointIO().save_checkpoint(checkpoint, f"{path}.torch")


def fit(folder, plugin, **options):
    torch.manual_seed(0)
    trainer = trainer_for(folder, plugin=plugin, **options)
    trainer.fit(Tiny(), torch.utils.data.DataLoader(range(100)))
    return trainer


@pytest.mark.parametrize(
    ("every", "last", "top_k"), [(1, True, 2), (3, True, 2), (4, "link", 3), (2, "link", 1), (5, True, -1)]
)
def test_what_is_kept_equals_what_torch_would_have_kept(tmp_path, every, last, top_k):
    plugin = Both(key_frame_every=every)
    fit(tmp_path, plugin, last=last, top_k=top_k, steps=7)
    kept = sorted(tmp_path.glob("*.ckpt"))
    assert len(kept) == (7 if top_k == -1 else top_k) + 1
    assert (tmp_path / "last.ckpt").is_symlink() == (last == "link")
    needed = set()
    for path in kept:
        expected = torch.load(f"{path.resolve()}.torch", weights_only=False)
        assert_same(plugin.load_checkpoint(path), expected)
        with open_file(path) as file:
            needed.add(file.base_digest)
    stored = {path.stem for path in (tmp_path / "key_frames").glob("*.safetensors")}
    assert stored == needed - {None}, "what is needed is kept, and nothing else once training is over"
    if top_k != 1:
        assert (len(needed - {None}) > 0) == (every > 1)


def test_a_checkpoint_is_read_without_pickle(tmp_path, monkeypatch):
    plugin = CompressedCheckpointIO()
    trainer = fit(tmp_path, plugin, steps=2)
    expected = trainer.optimizers[0].state_dict()

    def refuse(*_, **__):
        raise AssertionError("unpickled something")

    for module, name in ((pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    checkpoint = plugin.load_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert_same(checkpoint["optimizer_states"][0]["state"], expected["state"])
    assert checkpoint["hyper_parameters"] == {"width": 48}


def test_it_is_smaller(tmp_path):
    fit(tmp_path, Both(), steps=2, top_k=0)
    weights = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    plugin, checkpoint = CompressedCheckpointIO(), {"state_dict": {"w": weights}}
    plugin.save_checkpoint(checkpoint, tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").stat().st_size < 0.835 * weights.nbytes


def test_renamed_overwritten_and_removed_key_frames_stay_in_reach(tmp_path):
    plugin = CompressedCheckpointIO(key_frame_every=4)
    weights = torch.randn(5000, generator=torch.Generator().manual_seed(0))

    def save(number, name):
        plugin.save_checkpoint({"state_dict": {"w": weights * (1 + number * 1e-6)}, "n": number}, tmp_path / name)

    def bases():
        return len(list((tmp_path / "key_frames").glob("*.safetensors")))

    save(0, "new")
    (tmp_path / "new").rename(tmp_path / "last")
    save(1, "new")
    (tmp_path / "new").replace(tmp_path / "last")
    save(2, "other")
    save(2, "other")  # in place of itself
    for name, number in (("last", 1), ("other", 2)):
        assert torch.equal(plugin.load_checkpoint(tmp_path / name)["state_dict"]["w"], weights * (1 + number * 1e-6))
    assert bases() == 1
    save(4, "key")
    assert bases() == 2, "the old one is still needed"
    plugin.remove_checkpoint(tmp_path / "last")
    assert bases() == 2
    plugin.remove_checkpoint(tmp_path / "other")
    assert bases() == 1
    plugin.remove_checkpoint(tmp_path / "key")
    plugin.teardown()
    assert bases() == 0


def test_another_run_in_the_same_folder_may_take_a_base_away(tmp_path):
    weights = torch.randn(5000)
    first, second = CompressedCheckpointIO(key_frame_every=9), CompressedCheckpointIO(key_frame_every=9)
    first.save_checkpoint({"w": weights}, tmp_path / "first")
    first.remove_checkpoint(tmp_path / "first")
    second.save_checkpoint({"w": weights + 1}, tmp_path / "second")
    first.save_checkpoint({"w": weights * 2}, tmp_path / "third")
    assert torch.equal(first.load_checkpoint(tmp_path / "third")["w"], weights * 2)
    assert torch.equal(first.load_checkpoint(tmp_path / "second")["w"], weights + 1)


def test_weights_alone_are_no_base_for_whole_checkpoints(tmp_path):
    plugin = CompressedCheckpointIO(key_frame_every=9)
    weights, moments = torch.randn(5000), {str(n): torch.randn(5000) for n in range(3)}
    plugin.save_checkpoint({"w": weights}, tmp_path / "weights")
    plugin.save_checkpoint({"w": weights, **moments}, tmp_path / "whole")
    plugin.save_checkpoint({"w": weights}, tmp_path / "weights again")
    whole, again = (open_file(tmp_path / name) for name in ("whole", "weights again"))
    with whole, again:
        assert whole.base_digest is None
        assert again.base_digest == whole.digest


def test_a_module_is_loaded_from_a_checkpoint(tmp_path):
    trainer = fit(tmp_path, CompressedCheckpointIO(), steps=2)
    module = load_from_checkpoint(Tiny, tmp_path / "last.ckpt")
    assert_same(module.state_dict(), trainer.lightning_module.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_from_checkpoint(Tiny, tmp_path / "last.ckpt", width=3)


def test_checkpoints_of_torch_save_can_be_read(tmp_path):
    (tmp_path / "ours").write_bytes(0x4B50.to_bytes(8, "little") + b'{"__metadata__"')
    assert not is_torch_file(tmp_path / "ours"), "a header of 19280 bytes begins as a zip file does"
    torch.save({"epoch": 3}, tmp_path / "older.ckpt", _use_new_zipfile_serialization=False)
    assert is_torch_file(tmp_path / "older.ckpt")
    torch.save({"epoch": 3}, tmp_path / "old.ckpt")
    assert CompressedCheckpointIO().load_checkpoint(tmp_path / "old.ckpt") == {"epoch": 3}


def test_errors_say_what_to_do(tmp_path):
    plugin = CompressedCheckpointIO()
    with pytest.raises(ValueError, match=r"checkpoint\['a'\]\[0\] is a builtins.object"):
        plugin.save_checkpoint({"a": [object()]}, tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        plugin.load_checkpoint(tmp_path / "x")
    save_file({"t": torch.ones(1)}, tmp_path / "tensors")
    with pytest.raises(ValueError, match="holds tensors, but no training checkpoint"):
        plugin.load_checkpoint(tmp_path / "tensors")
    for call in (plugin.load_checkpoint, plugin.remove_checkpoint, lambda path: plugin.save_checkpoint({}, path)):
        with pytest.raises(ValueError, match="sharded checkpoint, which CompressedCheckpointIO does not write"):
            call(tmp_path)
    with pytest.raises(ValueError, match="no local path"):
        plugin.save_checkpoint({}, "s3://bucket/x")
    with pytest.raises(ValueError, match="`storage_options` is 1"):
        plugin.save_checkpoint({}, tmp_path / "x", 1)
    with pytest.raises(ValueError, match="`map_location` is"):
        plugin.load_checkpoint(tmp_path / "tensors", map_location={})
    for options in ({"key_frame_every": 0}, {"threads": 0}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` is 0"):
            CompressedCheckpointIO(**options)


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
@pytest.mark.parametrize("wrap", [lambda plugin: plugin, AsyncCheckpointIO])
def test_sharding_strategies_are_refused(strategy, wrap):
    made = strategy()
    refuse_sharded(made)
    made.checkpoint_io = wrap(CompressedCheckpointIO())
    with pytest.raises(ValueError, match=f"{strategy.__name__}: a sharded checkpoint, .* with DDP"):
        refuse_sharded(made)
    alone = SingleDeviceStrategy()
    alone.checkpoint_io = wrap(CompressedCheckpointIO())
    refuse_sharded(alone)


@pytest.fixture
def process_group():
    """Removes what a trainer leaves: its process group, and variables that child processes would take for theirs."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_any_trainer_refuses_them_before_it_trains(tmp_path):
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "max_steps": 1}
    plugins = [CompressedCheckpointIO()]
    trainer = Trainer(
        accelerator="cpu", devices=1, strategy=ModelParallelStrategy(1, 1), plugins=plugins,
        default_root_dir=tmp_path, callbacks=trainer_callbacks(), **options,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"ModelParallelStrategy: a sharded checkpoint, .* with DDP"):
        trainer.fit(BoringModel())


def test_lightning_is_told_of_the_refusal():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    found = tomllib.loads(text)["project"]["entry-points"]["lightning.pytorch.callbacks_factory"]
    assert found == {"litropy": f"{trainer_callbacks.__module__}:{trainer_callbacks.__name__}"}


def test_nothing_is_added_for_those_who_never_asked(monkeypatch):
    monkeypatch.setattr(CompressedCheckpointIO, "made", False)
    assert trainer_callbacks() == []
    monkeypatch.delitem(sys.modules, "litropy.callbacks.compressed_checkpoint_io")
    assert trainer_callbacks() == []


CASES = {
    "differences": [{"key_frame_every": 4}],
    "asynchronous": [{"key_frame_every": 1, "asynchronous": True, "last": False, "top_k": -1}],
    "two ranks": [{"key_frame_every": 4, "strategy": "ddp_fork", "devices": 2}],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Whole, killed and resumed runs of every case."""
    folder, commands = tmp_path_factory.mktemp("runs"), []
    for case, (options,) in CASES.items():
        resume = f"{case} killed/" + ("step=4.ckpt" if case == "asynchronous" else "last.ckpt")
        commands += [
            {"name": f"{case} whole", **options},
            {"name": f"{case} killed", "die_after": 5, "once_written": resume, **options},
            {"name": f"{case} resumed", "resume": resume, **options},
        ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), str(folder), json.dumps(commands)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    assert [bool(code) for code in codes] == [False, True, False] * len(CASES), done.stderr
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_killed_and_resumed_run_equals_one_that_was_not(runs, case):
    for rank in range(CASES[case][0].get("devices", 1)):
        whole, resumed = (torch.load(runs / f"{case} {kind}.{rank}.pt") for kind in ("whole", "resumed"))
        assert_same(resumed, whole)


@pytest.mark.parametrize("case", CASES)
def test_the_resumed_checkpoint_was_what_the_case_says(runs, case):
    deltas = 0
    for path in (runs / f"{case} whole").glob("*.ckpt"):
        with open_file(path) as file:
            deltas += file.base_digest is not None
            assert file.state["kind"] == "lightning checkpoint"
    assert (deltas > 0) == (CASES[case][0]["key_frame_every"] > 1)
