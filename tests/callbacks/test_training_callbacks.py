"""The callbacks with a plain Trainer, without the command line."""

import re
import time

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch.utils.data import DataLoader

from litropy.callbacks import (
    Curves,
    HuggingFaceFolder,
    LastCheckpoint,
    MetricsFile,
    RunReport,
    StepProgressBar,
    Throughput,
)
from litropy.callbacks.curves import clips, learning_rate_cuts, plot_curves
from litropy.callbacks.logged_steps import is_logged_step
from litropy.callbacks.metrics_file import read_metrics


class Tiny(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch["input_ids"]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.layer(batch["input_ids"]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def save_pretrained(self, folder):
        folder.mkdir()
        torch.save(self.state_dict(), folder / "weights.pt")


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return {"input_ids": torch.full((4,), float(index))}


def fit(tmp_path, callbacks, **options):
    options = {"max_steps": 8, "max_epochs": -1, "val_check_interval": 4, "log_every_n_steps": 2} | options
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        logger=MetricsFile(tmp_path, "plain", 0),
        default_root_dir=tmp_path,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, LastCheckpoint) for callback in callbacks),
        enable_progress_bar=any(isinstance(callback, StepProgressBar) for callback in callbacks),
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(Tiny(), DataLoader(Rows(), batch_size=2), DataLoader(Rows(), batch_size=5))
    return trainer, tmp_path / "plain" / "version_0"


class Slow(TorchCheckpointIO):
    """Takes its time, as a thread that compresses does."""

    def save_checkpoint(self, *args, **kwargs):
        time.sleep(0.05)
        super().save_checkpoint(*args, **kwargs)


def test_the_last_checkpoint_may_be_written_by_another_thread(tmp_path):
    options = {"max_steps": 4, "val_check_interval": 2, "plugins": [AsyncCheckpointIO(Slow())]}
    _, run = fit(tmp_path, [LastCheckpoint(every_n_train_steps=1)], **options)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    assert torch.load(run / "checkpoints" / "last.ckpt")["global_step"] == 4


def test_everything_works_with_a_plain_trainer(tmp_path, capsys):
    callbacks = [StepProgressBar(), Throughput(), LastCheckpoint(), HuggingFaceFolder(), Curves(), RunReport()]
    _, run = fit(tmp_path, callbacks)
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert (run / "hugging_face" / "weights.pt").is_file()
    assert (run / "curves.png").is_file()
    out = capsys.readouterr().out
    assert "step 8/8" in out
    assert "Tiny, 5 parameters" in out
    assert re.search(r"held-out loss +[\d.]+ nats, perplexity", out)
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)["global_step"] == 8


def test_throughput_counts_tokens_of_logged_steps_under_accumulation(tmp_path):
    _, run = fit(tmp_path, [Throughput()], accumulate_grad_batches=2, max_steps=4)
    rows = {int(row["step"]): row for row in read_metrics(run / "metrics.csv")}
    assert "train/tokens_per_second" in rows[1]
    assert rows[3]["train/tokens_per_second"] > 0
    assert rows[3]["train/peak_memory_mib"] > 50


def test_speed_leaves_out_the_time_of_validation(tmp_path, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("litropy.callbacks.throughput.time.perf_counter", lambda: float(next(clock)))
    throughput, trainer, module = Throughput(), pl.Trainer(logger=False, enable_checkpointing=False), Tiny()
    monkeypatch.setattr("litropy.callbacks.throughput.is_logged_step", lambda trainer: True)
    logged = {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: value}))
    batch = {"input_ids": torch.zeros(2, 4)}
    throughput.on_train_start(trainer, module)
    throughput.on_train_batch_end(trainer, module, None, batch, 0)  # 0 s: the clock starts
    throughput.on_validation_start(trainer, module)  # 1 s
    for _ in range(50):
        next(clock)
    throughput.on_validation_end(trainer, module)  # 52 s
    throughput.on_train_batch_end(trainer, module, None, batch, 1)  # 53 s, 51 of them validation
    assert logged["train/tokens_per_second"] == pytest.approx(8 / 2)


def test_last_checkpoint_is_saved_every_so_many_steps(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(LastCheckpoint, "_save", lambda self, trainer: saved.append(trainer.global_step))
    fit(tmp_path, [LastCheckpoint(every_n_train_steps=3)], limit_val_batches=0)
    assert saved[:3] == [3, 6, 8]
    with pytest.raises(ValueError, match="every_n_train_steps"):
        LastCheckpoint(every_n_train_steps=-1)


def test_a_model_that_cannot_be_exported_is_no_error(tmp_path, monkeypatch):
    monkeypatch.delattr(Tiny, "save_pretrained")
    with pytest.warns(UserWarning, match="has no `save_pretrained"):
        _, run = fit(tmp_path, [HuggingFaceFolder()])
    assert not (run / "hugging_face").exists()


def test_the_bar_counts_steps_in_a_terminal(tmp_path, monkeypatch):
    from io import StringIO

    from rich.console import Console

    bar, screen = StepProgressBar(), StringIO()
    bar.console = Console(file=screen, force_terminal=True, width=140, color_system=None)
    fit(tmp_path, [bar, Throughput()])
    text = screen.getvalue()
    assert "8/8" in text
    assert "val loss" in text
    assert "tokens/s" in text
    assert "Epoch" not in text


@pytest.mark.parametrize("every", [0, 1, 3])
def test_logged_steps_are_those_that_lightning_logs(every, tmp_path):
    class Compare(pl.Callback):
        seen = 0

        def on_train_batch_end(self, trainer, *args):
            expected = trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate()
            assert is_logged_step(trainer) == expected
            self.seen += expected

    compare = Compare()
    options = {"accumulate_grad_batches": 2, "limit_train_batches": 5, "limit_val_batches": 0}
    fit(tmp_path, [compare], max_epochs=3, max_steps=-1, val_check_interval=None, log_every_n_steps=every, **options)
    assert compare.seen == (9 // every if every else 0)


def test_curves_need_no_metric_at_all(tmp_path):
    plot_curves([], tmp_path / "empty.png")
    plot_curves([{"step": 0.0, "train/loss": 1.0}], tmp_path / "one.png", "one point")
    assert (tmp_path / "empty.png").stat().st_size > 5000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.png", "one.png"]


def test_curves_show_what_monitors_and_remedies_logged(tmp_path):
    def height(rows):
        plot_curves(rows, tmp_path / "some.png")
        return int.from_bytes((tmp_path / "some.png").read_bytes()[20:24])

    rows = [{"step": float(step), "collapse/alarm": step // 3, "entropy/attention/layer_11": 0.5} for step in range(9)]
    for row in rows[4:]:  # values are logged again until there are new ones
        row |= {"train/learning_rate_factor": 0.1, "qk_clip/max_logit": 40.0, "qk_clip/clipped_heads": 2.0}
    rows[3]["train/learning_rate_factor"] = 1.0
    rows[8] |= {"qk_clip/max_logit": 9.0, "qk_clip/clipped_heads": 0.0}
    assert (learning_rate_cuts(rows), clips(rows)) == ([4.0], [4.0])
    wide = [row | {"representation/effective_rank/layer_0": 9.0} for row in rows]
    assert height(rows[:1]) == height(rows) == 1.5 * height([{"step": 0.0}])
    assert height(wide) == 2 * height([{"step": 0.0}])
    assert height([row | {"val/pass_at_1": 0.5} for row in wide]) == height(wide)  # two lines of two
    assert height([row | {"reward/correct": 0.5} for row in rows[:1]]) == height(wide)
