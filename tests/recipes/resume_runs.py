"""Run in a process of its own: trains, dies and resumes, a forked child for each run, and prints how each ended."""

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from litropy.recipes import TextDataModule

warnings.filterwarnings("ignore", ".*bottleneck.*")
warnings.filterwarnings("ignore", ".*log_every_n_steps.*")


class Recorder(LightningModule):
    """Writes down every batch that it trains on; may die some batches after an optimiser step."""

    def __init__(self, record, die_after):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.record, self.die_after = record, die_after

    def training_step(self, batch, batch_idx):
        if self.die_after is not None and self.global_step > self.die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(f"{self.record}.{self.global_rank}", "a") as file:
            file.write(f"{self.current_epoch} {batch_idx} {batch['input_ids'].tolist()}\n")
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(folder, record, die_after=None, resume=None, save_every=4, data=None, **trainer):
    torch.set_num_threads(1)
    checkpoints = ModelCheckpoint(
        folder / f"checkpoints-{record}", "{step}", every_n_train_steps=save_every, save_top_k=-1,
        save_on_train_epoch_end=False,
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[checkpoints], **{"devices": 1, **trainer},
    )  # fmt: skip
    module = TextDataModule(cache_dir=str(folder / "cache"), **{"vocab_size": 300, **data})
    trainer.fit(Recorder(folder / record, die_after), module, ckpt_path=resume)


def codes_of(folder, runs):
    """Exit codes of forked children, one run after the other."""
    codes = []
    for run in runs:
        child = os.fork()
        if not child:
            code = 1
            try:
                train(folder, **run)
                code = 0
            finally:
                sys.stdout.flush()
                os._exit(code)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return codes


if __name__ == "__main__":
    jobs = json.loads(sys.argv[1])
    print(json.dumps({folder: codes_of(Path(folder), runs) for folder, runs in jobs.items()}))
