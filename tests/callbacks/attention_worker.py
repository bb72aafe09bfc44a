"""Runs on every rank of test_attention_ranks.py, or alone; writes what the ranks found to a file.

torchrun --nproc-per-node 2 attention_worker.py FOLDER
"""

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader

from litropy.callbacks import AttentionEntropyMonitor
from litropy.recipes import LanguageModel
from litropy.testing import tiny_config


def batches(rank, ranks):
    """This rank's share of two steps of four sequences, of which each has another length."""
    generator, found = torch.Generator().manual_seed(7), []
    for _ in range(2):
        ids = torch.randint(101, (4, 16), generator=generator)
        mask = (torch.arange(16) < torch.tensor([16, 9, 12, 16])[:, None]).long()
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        found.append({name: value[rank::ranks] for name, value in batch.items()})
    return found


class Sometimes(pl.LightningModule):
    """Its second layer runs only where a batch asks for it, as vision towers do for batches with images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(2))

    def training_step(self, batch, batch_idx):
        x = self.layers[0](batch["x"])
        if batch["both"]:
            x = self.layers[1](x)
        return x.square().mean() + sum(parameter.sum() for parameter in self.parameters()) * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class Record(pl.Callback):
    def __init__(self, monitor):
        self.monitor, self.readings, self.logged = monitor, [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        found = self.monitor.collapse_readings()
        self.readings.append((found.step, found.layers, dict(found.values)))
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.logged.append({name: value for name, value in metrics.items() if name.startswith(("entropy/att", "att"))})


def train(module, data, strategy, ranks=1):
    monitor = AttentionEntropyMonitor(sequences=8)
    record = Record(monitor)
    chosen = {
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "fsdp": lambda: ModelParallelStrategy(ranks, 1, process_group_backend="gloo"),
        "single": lambda: "auto",
    }[strategy]()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=chosen,
        max_epochs=1,
        logger=False,
        callbacks=[monitor, record],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=None))
    return record.readings, record.logged


def language_model(strategy, rank=0, ranks=1):
    torch.manual_seed(0)
    module = LanguageModel(
        config=tiny_config("llama"), pad_vocab_to=1, learning_rate=0.01, gradient_checkpointing=strategy != "ddp"
    )
    return train(module, batches(rank, ranks), strategy, ranks)


def sometimes(strategy, rank=0, ranks=1):
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    return train(Sometimes(), [{"x": x[rank::ranks], "both": rank == 0}], strategy, ranks)


def main(folder):
    torch.set_num_threads(1)
    place = {"rank": int(os.environ["RANK"]), "ranks": int(os.environ["WORLD_SIZE"])}
    found = {strategy: language_model(strategy, **place) for strategy in ("ddp", "fsdp")}
    found["sometimes"] = sometimes("ddp", **place)
    torch.save(found, folder / f"rank_{place['rank']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
