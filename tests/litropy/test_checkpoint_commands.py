"""``litropy export``, ``verify`` and ``decompress``, and the callback that exports at the end of training."""

import json

import pytest
import safetensors.torch
import torch

from litropy.callbacks.checkpoint_format import load_file


@pytest.fixture(scope="module")
def run(project):
    """A run with CompressedExport."""
    import os

    from litropy.cli import main

    before = os.getcwd()
    os.chdir(project)
    try:
        callback = "--trainer.callbacks+=CompressedExport"
        place = ["--trainer.default_root_dir", "exported", "--trainer.max_steps", "4"]
        main(["fit", "--config", "tiny.yaml", *place, callback])
    finally:
        os.chdir(before)
    return project / "exported" / "tiny" / "version_0"


def same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], tensor) for name, tensor in right.items())


def test_the_callback_leaves_a_folder_with_the_same_weights(run):
    folder = run / "hugging_face_litropy"
    weights = safetensors.torch.load_file(run / "hugging_face" / "model.safetensors")
    same(load_file(folder / "model.litropy.safetensors"), weights)
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= {path.name for path in folder.iterdir()}
    report = json.loads((folder / "litropy_report.json").read_text())
    assert report["bit_exact"]
    assert report["tensors"] == len(weights)
    assert report["file_bytes"] == (folder / "model.litropy.safetensors").stat().st_size
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_export_verify_and_decompress(litropy, run, tmp_path):
    plain = run / "hugging_face"
    result = litropy("export", plain, tmp_path / "small", "--codec", "zstd", "--threads", 2)
    assert result.code == 0, result.err
    assert "bit for bit" in result.out
    result = litropy("verify", tmp_path / "small")
    assert result.code == 0, result.err
    assert "model.litropy.safetensors" in result.out
    assert litropy("verify", tmp_path / "small" / "model.litropy.safetensors").code == 0
    result = litropy("decompress", tmp_path / "small", tmp_path / "plain")
    assert result.code == 0, result.err
    same(*(safetensors.torch.load_file(folder / "model.safetensors") for folder in (tmp_path / "plain", plain)))
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == json.loads(
        (plain / "config.json").read_text()
    )
    path = tmp_path / "small" / "model.litropy.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    result = litropy("verify", tmp_path / "small")
    assert result.code == 1
    assert "but only" in result.err


def test_a_checkpoint_is_exported_with_the_tokenizer_of_its_run(litropy, run, tmp_path):
    result = litropy("export", run / "checkpoints" / "last.ckpt", tmp_path / "small")
    assert result.code == 0, result.err
    assert {"config.json", "tokenizer.json", "litropy_report.json"} <= {p.name for p in (tmp_path / "small").iterdir()}
    weights = safetensors.torch.load_file(run / "hugging_face" / "model.safetensors")
    same(load_file(tmp_path / "small" / "model.litropy.safetensors"), weights)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    result = litropy("export", run / "hugging_face", tmp_path / "x", "--tokenizer", "y")
    assert result.code == 1
    assert "--tokenizer is for checkpoints" in result.err


def test_mistakes_are_short(litropy, run, tmp_path):
    result = litropy("export", tmp_path, tmp_path / "x")
    assert result.code == 1
    assert "no config.json" in result.err
    result = litropy("decompress", run / "hugging_face", tmp_path / "x")
    assert result.code == 1
    assert "not compressed by litropy" in result.err
    assert "Traceback" not in result.err
    assert litropy("verify").code == 2
    assert litropy("export", "--help").code == 0
    assert "decompress" in litropy("--help").out
