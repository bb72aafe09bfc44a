"""Two CPU processes under DDP and FSDP2 against one: what is measured, and what is decided on it."""

import os
import sys
from pathlib import Path

import gloo_ranks
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from litropy.callbacks import CollapseDetector, RepresentationCollapseMonitor
from litropy.callbacks.collapse_readings import Readings
from litropy.recipes import LanguageModel
from litropy.testing import tiny_config


class Uneven(Callback):
    """Publishes attention numbers that ranks have rounded differently, at the edge of a rule, and logs the level."""

    def __init__(self):
        self.readings, self.step, self.levels = None, 0, []

    def collapse_readings(self):
        return self.readings

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step > self.step:
            entropy = torch.full((1, 2), 0.9 if self.step < 2 else 0.45 + 1e-6 * trainer.global_rank)
            values = {"attention/entropy": entropy, "attention/max_logit": torch.full((1, 2), 2.0 * 3**self.step)}
            self.readings = Readings(self.step, values, (0,))
        self.levels.append(float(trainer.callback_metrics["collapse/alarm"]))


def batches(rank, ranks, accumulate):
    """Four steps of eight sequences, dealt out to ranks and micro-batches."""
    ids = torch.randint(101, (4, 8, 12), generator=torch.Generator().manual_seed(3))
    pieces = ids[:, rank::ranks].chunk(accumulate, 1)
    found = [piece[step] for step in range(4) for piece in pieces]
    return [{"input_ids": tokens, "labels": tokens} for tokens in found] * 4


def train(strategy, ranks=1, rank=0, accumulate=1):
    seed_everything(3, verbose=False)
    module = LanguageModel(config=tiny_config("llama"), learning_rate=1e-3, pad_vocab_to=1)
    monitor, uneven = RepresentationCollapseMonitor(every_n_steps=2), Uneven()
    detector, gradients = CollapseDetector(every_n_steps=3), []
    add = detector._inbox.add
    detector._inbox.add = lambda readings: (gradients.append(readings.values), add(readings))
    chosen = {
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "fsdp": lambda: ModelParallelStrategy(ranks, 1, process_group_backend="gloo"),
        "single": lambda: "auto",
    }[strategy]()
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=chosen,
        max_steps=16,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        callbacks=[detector, monitor, uneven],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, DataLoader(batches(rank, ranks, accumulate), batch_size=None))
    return {
        "values": {name: value.clone() for name, value in monitor.collapse_readings().values.items()},
        "logged": {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("representation/")},
        "alarms": detector.alarms,
        "levels": uneven.levels,
        "losses": [loss for _, loss in detector.judge.loss.recent],
        "gradients": gradients,
        "state": repr(detector.state_dict()["judge"]),
    }


def main(folder):
    torch.set_num_threads(1)
    place = {"ranks": int(os.environ["WORLD_SIZE"]), "rank": int(os.environ["RANK"])}
    found = {("ddp", a): train("ddp", accumulate=a, **place) for a in (1, 2)}
    found["fsdp", 1] = train("fsdp", **place)
    torch.save(found, folder / f"rank{place['rank']}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    gloo_ranks.launch(__file__, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def single():
    return train("single")


@pytest.mark.parametrize("case", [("ddp", 1), ("ddp", 2), ("fsdp", 1)])
def test_ranks_measure_what_one_process_measures(found, single, case):
    for rank in found:
        assert rank[case]["logged"] == pytest.approx(single["logged"], rel=1e-3)
        assert rank[case]["losses"] == pytest.approx(single["losses"], rel=1e-4)
        ours, theirs = ([v for v in run["gradients"] if "gradient/rms_over_eps" in v] for run in (rank[case], single))
        assert len(ours) == len(theirs) > 3
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1)
        for name, value in single["values"].items():
            torch.testing.assert_close(rank[case]["values"][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", [("ddp", 1), ("ddp", 2), ("fsdp", 1)])
def test_ranks_decide_alike_on_numbers_that_differ(found, case):
    first, second = (rank[case] for rank in found)
    assert first["state"] == second["state"]
    assert first["levels"] == second["levels"]
    assert first["alarms"] == second["alarms"]
    assert [alarm.rule for alarm in first["alarms"]][:1] == ["attention_entropy"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
