"""Run in a process of its own: trains with compressed checkpoints, dies and resumes, a forked child for each run."""

import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # optimisers import it, which takes seconds, better once than in each child
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from litropy.callbacks.checkpoint_format import load_file, save_file
from litropy.callbacks.compressed_checkpoint_io import CompressedCheckpointIO

warnings.filterwarnings("ignore", ".*(bottleneck|log_every_n_steps|exists and is not empty|GPU|_pytree).*")


class Tiny(LightningModule):
    """Two layers with dropout, whose random numbers are part of the checkpoint."""

    def __init__(self, width: int = 48, die_after: int | None = None, once_written: str = "."):
        super().__init__()
        self.save_hyperparameters(ignore=["die_after", "once_written"])
        self.die_after, self.once_written = die_after, once_written
        self.random = None
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(8, width), torch.nn.BatchNorm1d(width), torch.nn.Dropout(0.2), torch.nn.Linear(width, 8)
        )

    def training_step(self, batch, batch_idx):
        if self.die_after is not None and self.global_step >= self.die_after:
            while not os.path.exists(self.once_written):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        if self.random is not None:
            # here, because starting to train draws numbers; they are those of rank 0, which every rank has here
            torch.set_rng_state(self.random[0])
            random.setstate(self.random[1])
            np.random.set_state(self.random[2])  # noqa: NPY002
            self.random = None
        seed = 1000 * self.global_step + self.global_rank
        inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
        loss = (self.layers(inputs) - inputs.flip(-1)).square().mean()
        self.log("score", random.random() + np.random.rand())  # noqa: NPY002
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, amsgrad=True)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20), "interval": "step"}
        ]

    def on_train_end(self):
        result = {"weights": self.state_dict(), "optimizer": self.trainer.optimizers[0].state_dict()}
        torch.save(result, f"{self.trainer.checkpoint_callback.dirpath}.{self.global_rank}.pt")

    def on_save_checkpoint(self, checkpoint):
        checkpoint["random"] = (torch.get_rng_state(), random.getstate(), np.random.get_state())  # noqa: NPY002

    def on_load_checkpoint(self, checkpoint):
        self.random = checkpoint["random"]


def trainer_for(folder, steps=8, plugin=None, last=True, top_k=2, every=1, **options):
    checkpoints = ModelCheckpoint(
        folder, "{step}", monitor="score", save_top_k=top_k, save_last=last, every_n_train_steps=every,
        save_on_train_epoch_end=False, enable_version_counter=False,
    )  # fmt: skip
    return Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=steps,
        callbacks=[checkpoints], plugins=[plugin] if plugin else None, **{"devices": 1, **options},
    )  # fmt: skip


def train(
    folder, name, die_after=None, once_written=None, resume=None, key_frame_every=3, asynchronous=False, **options
):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    plugin = CompressedCheckpointIO(key_frame_every=key_frame_every)
    plugin = AsyncCheckpointIO(plugin) if asynchronous else plugin
    trainer = trainer_for(folder / name, plugin=plugin, **options)
    module = Tiny(die_after=die_after, once_written=str(folder / (once_written or ".")))
    loader = torch.utils.data.DataLoader(range(100))
    trainer.fit(module, loader, ckpt_path=None if resume is None else str(folder / resume))


if __name__ == "__main__":
    folder, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    # what is compiled when it is first used is better compiled once than in each child
    for base in (None, folder / "warm.0"):
        save_file({"t": torch.randn(40_000)}, folder / f"warm.{int(base is not None)}", base=base)
        load_file(folder / f"warm.{int(base is not None)}", base=base)
    codes = []
    for run in runs:
        child = os.fork()
        if not child:
            code = 1
            try:
                train(folder, **run)
                code = 0
            except Exception:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(codes))
