"""Two ranks of what learns from rewards and what comes before: watched RLVR, and EntropySFT. Argument: a folder."""

import os
import sys
from pathlib import Path

import rlvr_problems as problems
import torch
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from litropy.callbacks import EntropyChange, EntropyLawForecast, PolicyMonitor, SampleTable
from litropy.recipes import RLVR, EntropySFT
from litropy.recipes.sharding import full_state_dict
from litropy.recipes.steering import AdaptiveTemperature, RecentSampleRecovery


def watched_run(folder, strategy, rank=0, ranks=1):
    """Train on scripted responses while everything watches; what was logged, and what the callbacks remember."""
    law, change, table = EntropyLawForecast("reward/mean"), EntropyChange(), SampleTable(every_n_steps=1, rows=4)
    data = problems.Sums(batches=7, size=4 // ranks, rank=rank, ranks=ranks)
    callbacks = [PolicyMonitor(marker=[7]), law, change, table]
    found = problems.scripted_run(RLVR, data, strategy, ranks, callbacks=callbacks, default_root_dir=folder)
    return found | {"points": law.points, "change": change.state_dict(), "table": str(table.path)}


class InOrder(problems.Sums):
    """Ranks have parts of a batch that follow one another, as TaskDataModule deals them out."""

    def train_dataloader(self):
        samples = self.samples()
        starts = range(self.rank * self.size, len(samples), self.size * self.ranks)
        return DataLoader([samples[start : start + self.size] for start in starts], batch_size=None)


def selected_run(strategy, rank=0, ranks=1):
    """Train on what recovery selects, with a sampler that learns from each step."""
    methods = {"data": RecentSampleRecovery(groups=3), "sampler": AdaptiveTemperature()}
    data = InOrder(batches=5, size=4 // ranks, rank=rank, ranks=ranks)
    return problems.scripted_run(RLVR, data, strategy, ranks, methods=methods)


class Sequences(LightningDataModule):
    """Three batches of four sequences over all ranks, with targets in any number."""

    def __init__(self, rank, ranks):
        super().__init__()
        self.tokenizer = problems.tokenizer()
        ids = torch.randint(3, 16, (12, 9), generator=torch.Generator().manual_seed(4))
        labels = ids.clone()
        for row, count in enumerate([8, 0, 3, 8, 1, 1, 0, 5, 0, 8, 2, 0]):
            labels[row, : 9 - count] = -100
        rows = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
        self.rows, self.size = rows[rank::ranks], 4 // ranks

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=self.size)


def fine_tuned(strategy, rank=0, ranks=1):
    """Weights and the last metrics of EntropySFT."""
    seed_everything(3, verbose=False)
    config = problems.CONFIG | {"initializer_range": 0.5}
    module = EntropySFT(share=0.4, config=config, pad_vocab_to=1, learning_rate=0.01, eps=1e-2, check_parity=False)
    metrics = problems.Metrics()
    trainer = problems.trainer(devices=ranks, strategy=strategy, callbacks=[metrics], limit_val_batches=0)
    trainer.fit(module, datamodule=Sequences(rank, ranks))
    weights = {name: value.clone() for name, value in full_state_dict(module.model).items()}
    return {"weights": weights, "logged": metrics.rows}


def refused(rank, ranks):
    """What RLVR says to FSDP2."""
    try:
        problems.scripted_run(RLVR, problems.Sums(size=4 // ranks, rank=rank, ranks=ranks), sharded(ranks), ranks)
    except ValueError as error:
        return str(error)


def replicated():
    return DDPStrategy(process_group_backend="gloo")


def sharded(ranks):
    return ModelParallelStrategy(ranks, 1, process_group_backend="gloo")


if __name__ == "__main__":
    folder, rank, ranks = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = {
        "watched": watched_run(folder, replicated(), rank, ranks),
        "selected": selected_run(replicated(), rank, ranks),
        "ddp": fine_tuned(replicated(), rank, ranks),
        "fsdp2": fine_tuned(sharded(ranks), rank, ranks),
        "refused": refused(rank, ranks),
    }
    torch.save(found, folder / f"rank_{rank}.pt")
