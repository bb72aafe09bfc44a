"""Runs on every rank of test_distributed.py, or alone; writes what the ranks found to a file.

torchrun --nproc-per-node 2 distributed_worker.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.utils.data import DataLoader

from litropy.recipes import LanguageModel
from litropy.recipes.causal_lm import next_token_targets
from litropy.recipes.sharding import full_state_dict
from litropy.testing import tiny_config

# optimiser steps of four, four and two sequences; how many of the 15 targets each sequence has
TARGETS = [[15, 1, 0, 7], [0, 15, 0, 0], [3, 11]]


def sequences():
    generator = torch.Generator().manual_seed(7)
    items = []
    for count in (count for step in TARGETS for count in step):
        ids = torch.randint(101, (16,), generator=generator)
        labels = ids.clone()
        labels[: 16 - count] = -100
        items.append({"input_ids": ids, "labels": labels})
    return items


def batches(rank, ranks, accumulate):
    """This rank's micro-batches: each step's sequences dealt out to ranks, then to micro-batches."""
    items, found = sequences(), []
    for step in TARGETS:
        mine = items[: len(step)][rank::ranks]
        del items[: len(step)]
        size = 1 if accumulate > 1 else len(mine)
        for start in range(0, len(mine), size):
            piece = mine[start : start + size]
            batch = {name: torch.stack([item[name] for item in piece]) for name in piece[0]}
            if ranks > 1:  # these name their targets, down to none; alone a process looks at every position
                rows = next_token_targets(batch["labels"]).flatten().ne(-100).nonzero()[:, 0]
                batch["target_rows"] = F.pad(rows, (0, -len(rows) % 8), value=15)
            found.append(batch)
    return found


class Record(Callback):
    """Keeps what was logged, and the gathers of the root unit, a step."""

    def __init__(self, stop=False):
        self.logged, self.gathers, self.count, self.stop = [], [], 0, stop

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step > len(self.logged):
            metrics = trainer.callback_metrics
            self.logged.append({name: float(value) for name, value in metrics.items() if name.startswith("train/")})
        self.gathers.append(self.count)
        self.count = 0

    def on_train_epoch_end(self, trainer, module):
        trainer.should_stop = self.stop


def count_root_gathers(module, record):
    """Count how often the unit of embedding and head is gathered."""
    state = module.model._get_fsdp_state()
    # the attribute's name depends on the version of torch
    group = state._fsdp_param_group if hasattr(state, "_fsdp_param_group") else state._fsdp_param_groups[0]
    original = FSDPParamGroup.unshard

    def unshard(self, *args, **kwargs):
        if self is group and self.is_sharded:
            record.count += 1
        return original(self, *args, **kwargs)

    FSDPParamGroup.unshard = unshard
    return lambda: setattr(FSDPParamGroup, "unshard", original)


def make_trainer(strategy, ranks=1, **options):
    chosen = {
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "fsdp": lambda: ModelParallelStrategy(ranks, 1, process_group_backend="gloo"),
        "single": lambda: "auto",
    }[strategy]()
    return Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=chosen,
        gradient_clip_val=0.5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **options,
    )


def make_module(architecture="llama", keys=None, **options):
    seed_everything(3, verbose=False)
    settings = {"learning_rate": 0.05, "eps": 1e-2, "warmup_steps": 1, "pad_vocab_to": 1}
    return LanguageModel(config=tiny_config(architecture, **(keys or {})), **settings | options)


def train(
    strategy,
    accumulate=1,
    ranks=1,
    rank=0,
    epochs=1,
    stop=False,
    ckpt_path=None,
    architecture="llama",
    keys=None,
    **options,
):
    """Three optimiser steps an epoch; returns weights, what was logged, gathers, module and trainer."""
    module, record = make_module(architecture, keys), Record(stop)
    trainer = make_trainer(
        strategy, ranks, max_epochs=epochs, accumulate_grad_batches=accumulate, callbacks=[record], **options
    )
    restore = []
    if strategy == "fsdp":
        module.on_fit_start = lambda: restore.append(count_root_gathers(module, record))
    loader = DataLoader(batches(rank, ranks, accumulate), batch_size=None)
    trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
    for undo in restore:
        undo()
    return (
        {
            "weights": {name: value.clone() for name, value in full_state_dict(module.model).items()},
            "logged": record.logged,
            "gathers": record.gathers,
            "val": {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")},
        },
        module,
        trainer,
    )


class Words:
    """Stands for a tokenizer."""

    pad_token_id, eos_token_id, bos_token_id = 0, 1, None

    def __len__(self):
        return 101

    def batch_decode(self, ids, skip_special_tokens):
        return [" ".join(map(str, row)) for row in ids.tolist()]

    def save_pretrained(self, folder):
        Path(folder, "tokenizer.json").write_text("{}")


def main(folder):
    """Every case, one after the other in the same two processes."""
    torch.set_num_threads(1)
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    place = {"ranks": ranks, "rank": rank}
    found = {}
    for strategy in ("ddp", "fsdp"):
        for accumulate in (1, 2):
            found[strategy, accumulate], _, _ = train(strategy, accumulate, **place)
    found["tied"], _, _ = train("fsdp", **place, keys={"tie_word_embeddings": True})
    found["mixture"], _, _ = train("ddp", **place, architecture="mixtral")
    found["bf16"], _, _ = train("fsdp", **place, precision="bf16-mixed")

    # interrupted after one epoch and resumed, against two epochs at once
    found["whole"], module, _ = train("fsdp", **place, epochs=2)
    module.save_pretrained(folder / "hugging_face")
    checkpoint = str(folder / "last.ckpt")
    _, _, trainer = train("fsdp", **place, epochs=2, stop=True)
    trainer.save_checkpoint(checkpoint)
    found["resumed"], module, trainer = train("fsdp", **place, epochs=2, ckpt_path=checkpoint)

    module.generation = {"max_new_tokens": 4, "do_sample": False}
    trainer.datamodule = None
    type(module).tokenizer = property(lambda self: Words())
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    module.eval()
    with torch.no_grad():
        found["generated"] = module.predict_step(batch, 0)
    if rank == 0:
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
