"""Runs on every rank of test_remedies_distributed.py, or alone; writes what the ranks found to a file.

torchrun --nproc-per-node 2 remedy_worker.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from litropy.callbacks.entropy_regularizer import AttentionEntropyRegularizer
from litropy.callbacks.qk_clip import QKClip
from litropy.callbacks.recovery import recovery_actions
from litropy.callbacks.sigma_reparam import SigmaReparam
from litropy.callbacks.sigma_reparam_weights import folded_state_dict, spectral_gains

sys.path.insert(0, str(Path(__file__).parent))
import remedy_runs as runs

STEPS = 4


class ShardedLM(runs.TinyLM):
    """Shards its model, after a remedy that has to come before."""

    def __init__(self, before_sharding=None):
        super().__init__(1e-2, eps=1e-3)
        self.before_sharding = before_sharding

    def configure_model(self):
        if self.device_mesh is None or getattr(self, "sharded", False):
            return
        if self.before_sharding is not None:
            self.before_sharding(self.model)
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.model.decoder.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.sharded = True


def full_state(module):
    """All of the model on every rank."""
    state = get_model_state_dict(
        module.model, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
    )
    return {name: value.clone() for name, value in state.items()}


def strategy_of(name, ranks):
    return {
        "single": lambda: "auto",
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "fsdp": lambda: ModelParallelStrategy(ranks, 1, process_group_backend="gloo"),
    }[name]()


def train(name, callbacks, before_sharding=None, ranks=1, rank=0, steps=STEPS, **options):
    """A few steps, each on the same two batches however many ranks share them."""
    data = runs.Markov(2, parts=(0, 1) if ranks == 1 else (rank,), stride=2)
    module = ShardedLM(before_sharding)
    return runs.train(
        None, callbacks, steps, module, data=data, devices=ranks, strategy=strategy_of(name, ranks),
        use_distributed_sampler=False, **options,
    )  # fmt: skip


def sigma(name, ranks=1, rank=0, folder=None):
    """SigmaReparam; if a folder is given, also saved in the middle and resumed."""

    def run(**options):
        remedy = SigmaReparam()
        return train(name, [remedy], remedy.insert, ranks, rank, **options)

    module, _ = run()
    found = {"state": full_state(module), "folded": folded_state_dict(full_state(module))}
    if folder is not None:
        _, trainer = run(steps=STEPS // 2)
        trainer.save_checkpoint(folder / f"{name}.ckpt")
        module, _ = run(ckpt_path=folder / f"{name}.ckpt")
        found["resumed"] = full_state(module)
    if name == "fsdp":
        try:
            train(name, [SigmaReparam()], None, ranks, rank)
        except ValueError as error:
            found["too_late"] = str(error)
    found["vectors"] = torch.stack([spectral.right.sum() for _, _, spectral in spectral_gains(module)])
    return found


def clip(name, ranks=1, rank=0, folder=None):
    """QKClip after every step, with a limit that many heads exceed."""
    module, trainer = train(name, [QKClip(tau=2.0)], None, ranks, rank)
    return {"state": full_state(module), "clipped": float(trainer.callback_metrics["qk_clip/clipped_heads"])}


def recover(name, ranks=1, rank=0, folder=None):
    """All actions of the preset after an alarm in the second step; saved right after it, and resumed."""

    def run(alarms, **options):
        actions = recovery_actions(tau=2.0, hold_steps=1, recovery_steps=3)
        return train(name, [runs.Alarms(actions, alarms)], None, ranks, rank, **options)

    module, trainer = run([1])
    found = {"state": full_state(module), "factor": float(trainer.callback_metrics["train/learning_rate_factor"])}
    if folder is not None:
        _, trainer = run([1], steps=2)
        trainer.save_checkpoint(folder / f"{name}.ckpt")
        module, _ = run([], ckpt_path=folder / f"{name}.ckpt")
        found["resumed"] = full_state(module)
    return found


def regularize(name, ranks=1, rank=0, folder=None):
    """A strong pull on all heads."""
    regularizer = AttentionEntropyRegularizer(weight=20.0, margin=0.05, threshold=0.3, floor=0.95, rows=None)
    module, _ = train(name, [regularizer], None, ranks, rank)
    return {"state": full_state(module), "thresholds": dict(regularizer.penalty.thresholds)}


CASES = {"sigma": sigma, "clip": clip, "recover": recover, "regularize": regularize}


def main(folder):
    """Every case, one after the other in the same two processes."""
    torch.set_num_threads(1)
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    found = {(case, name): run(name, ranks, rank, folder) for case, run in CASES.items() for name in ("ddp", "fsdp")}
    torch.save(found, folder / f"found{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
