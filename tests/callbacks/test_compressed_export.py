"""CompressedExport: at the end, at each save, or the best model."""

import json

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from safetensors.torch import save_file

from litropy.callbacks import CompressedCheckpointIO, CompressedExport
from litropy.callbacks.checkpoint_format import load_file


class Counter(LightningModule):
    """Its weight counts the steps; the third is the best."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))

    def training_step(self, batch, batch_idx):
        self.log("score", abs(float(self.global_step) - 2))
        return -self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)

    def save_pretrained(self, folder):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "counter"}))
        save_file({"weight": self.weight.detach()}, folder / "model.safetensors")


def fit(folder, export, resume=None, plugin=None, **options):
    best = ModelCheckpoint(folder / "checkpoints", "{step}", monitor="score", save_top_k=1, every_n_train_steps=1)
    every = ModelCheckpoint(folder / "checkpoints", "every-{step}", save_top_k=-1, every_n_train_steps=2)
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[export, best, every], plugins=plugin, **{"max_steps": 5, **options},
    )  # fmt: skip
    module = Counter()
    trainer.fit(module, torch.utils.data.DataLoader(range(20)), ckpt_path=resume, weights_only=False)
    return module


def exported(folder):
    return load_file(folder / "model.litropy.safetensors")["weight"].tolist()


def test_at_the_end(tmp_path, capsys):
    fit(tmp_path, CompressedExport())
    assert "Exported 1 tensors, bit for bit: 12 bytes in " in capsys.readouterr().out
    assert exported(tmp_path / "hugging_face_litropy") == [5.0] * 3
    with pytest.raises(ValueError, match="exists and is not overwritten"):
        fit(tmp_path, CompressedExport())


@pytest.mark.parametrize("plugin", [None, AsyncCheckpointIO(CompressedCheckpointIO())], ids=["plain", "asynchronous"])
def test_the_best(plugin, tmp_path):
    module = fit(tmp_path, CompressedExport(when="best"), plugin=plugin)
    assert exported(tmp_path / "hugging_face_litropy") == [3.0] * 3
    assert module.weight.tolist() == [5.0] * 3


def test_each_save_once_and_on_when_the_run_goes_on(tmp_path):
    fit(tmp_path, CompressedExport(when="save"), max_steps=4)
    folder = tmp_path / "hugging_face_litropy"
    assert {path.name: exported(path)[0] for path in folder.iterdir()} == {
        "step_1": 1,
        "step_2": 2,
        "step_3": 3,
        "step_4": 4,
    }
    resume = next((tmp_path / "checkpoints").glob("every-step=4*"))
    fit(tmp_path, CompressedExport(when="save"), max_steps=6, resume=resume)
    assert exported(folder / "step_6") == [6.0] * 3
    with pytest.raises(ValueError, match="exists and is not overwritten"):
        fit(tmp_path, CompressedExport(when="save"))


def test_what_would_fail_later_fails_now(tmp_path):
    with pytest.raises(ValueError, match="`when` is 'often'; it must be 'end', 'best' or 'save'"):
        CompressedExport(when="often")
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[CompressedExport(when="best")],
        default_root_dir=tmp_path, enable_progress_bar=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="needs a ModelCheckpoint with a `monitor`"):
        trainer.fit(Counter(), torch.utils.data.DataLoader(range(2)))
