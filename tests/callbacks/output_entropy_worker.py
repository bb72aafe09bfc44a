"""Runs on every rank of test_output_entropy_ranks.py, or alone; writes what each rank has logged to a file.

torchrun --nproc-per-node 2 output_entropy_worker.py FOLDER
"""

import importlib.util
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from litropy.callbacks import OutputEntropyMonitor
from litropy.callbacks.output_entropy_probe import rows_of
from litropy.recipes import LanguageModel
from litropy.testing import tiny_causal_lm, tiny_config

spec = importlib.util.spec_from_file_location("output_runs", Path(__file__).with_name("output_runs.py"))
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)

# targets of each sequence, of one micro-batch of both ranks together after the other
TARGETS = [[11, 1, 0, 7], [0, 0, 5, 0], [2, 3, 11, 9], [1, 1, 0, 0]]


class OwnLoss(runs.OwnLoss):
    """Tied, with a softcap; the model and its head are one unit under FSDP2, or the head is one of its own."""

    def __init__(self, tied):
        super().__init__(tiny_causal_lm("gemma2" if tied else "llama"))

    def configure_model(self):
        if self.device_mesh is None:
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        if not self.model.config.tie_word_embeddings:
            fully_shard(self.model.lm_head, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


MODULES = {
    "own loss, tied": lambda: OwnLoss(True),
    "own loss": lambda: OwnLoss(False),
    "LanguageModel": lambda: LanguageModel(config=tiny_config("gemma2"), learning_rate=0.0, weight_decay=0.0),
}


def train(name, strategy="auto", rank=0, ranks=1):
    """What a rank has logged and published, a step."""
    batches = []
    for seed, targets in enumerate(TARGETS):
        batch = runs.batch_of(targets, seed)
        batches.append({key: value[rank::ranks] for key, value in batch.items()})
    torch.manual_seed(0)
    record, monitor = runs.Record(), OutputEntropyMonitor(on_policy=name == "own loss")
    options = {"strategy": strategy, "devices": ranks, "accumulate_grad_batches": 2, "use_distributed_sampler": False}
    runs.fit(MODULES[name](), batches, monitor, record, **options)
    readings = {name: float(value) for name, value in monitor.collapse_readings().values.items()}
    return {"logged": record.logged, "readings": readings}


def with_parts(found):
    """Rows of logits of which each rank holds a part of the vocabulary, or of the positions."""
    mesh = init_device_mesh("cpu", (2,))
    logits, places = torch.arange(2 * 5 * 7.0).view(2, 5, 7), torch.tensor([9, 0, 4])
    for dim in (1, 2):
        found["parts", dim] = rows_of(distribute_tensor(logits, mesh, [Shard(dim)]), places)
    found["parts", "all"] = rows_of(logits, places)


def main(folder):
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = {}
    for name in MODULES:
        found[name, "ddp"] = train(name, DDPStrategy(process_group_backend="gloo"), rank, ranks)
        sharded = ModelParallelStrategy(ranks, 1, process_group_backend="gloo")
        found[name, "fsdp"] = train(name, sharded, rank, ranks)
    with_parts(found)
    torch.save(found, Path(folder, f"rank_{rank}.pt"))


if __name__ == "__main__":
    main(sys.argv[1])
