"""Two digits that sum to a target, written by a transformer of two layers: ``RLVR`` in a Lightning Trainer.

A supervised phase of ``RLVR`` comes first, once a seed, and gets a quarter of the answers right. Every method starts
from there, as from a pretrained model.
"""

import atexit
import functools
import shutil
import tempfile
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from steering_methods import Method, build
from steering_record import LARGEST, TERMS, Curves, Found, passes, solutions
from transformers.utils import logging as transformers_logging

from litropy.recipes import RLVR, TaskDataModule
from litropy.recipes.rlvr_samples import Sample
from litropy.recipes.rlvr_warm_start import solution_batch
from litropy.recipes.tasks import SumToTarget

BATCHES, EVERY = 72, 4
_MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
}
_WARM_STEPS, _WARM_RATE, _WARM_BATCH = 100, 3e-3, 64
OPTIONS = {
    "learning_rate": 1.5e-3,
    "group_size": 8,
    "epochs": 4,
    "micro_batch_size": 1024,
    "max_new_tokens": 2 * TERMS,
}
_PROMPTS = 32


def _data(batch_size: int, seed: int) -> TaskDataModule:
    task = SumToTarget(TERMS, LARGEST)
    return TaskDataModule(task=task, val_fraction=0, batch_size=batch_size, num_train=65536, seed=seed)


def _fit(model: RLVR, data: TaskDataModule, callbacks: list[Callback], **limits: Any) -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        **limits,
    )
    trainer.fit(model, datamodule=data)


@functools.cache
def warm_start(seed: int) -> str:
    """A folder with the model that all methods of a seed start from."""
    torch.manual_seed(seed)
    model = RLVR(config=_MODEL, pad_vocab_to=1, learning_rate=_WARM_RATE, warm_start_steps=_WARM_STEPS)
    _fit(model, _data(_WARM_BATCH, 2 * seed), [], max_steps=_WARM_STEPS, max_epochs=-1)
    folder = tempfile.mkdtemp(prefix="steering_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model.causal_lm.save_pretrained(folder)
    return folder


@torch.no_grad()
def measure(model: RLVR, tokenizer: Any) -> Found:
    """Accuracy and diversity at temperature 1."""
    digits, target = solutions()
    answers = ["+".join(map(str, row)) for row in digits.tolist()]
    samples = [
        Sample(f"{number}=", None, "", 0, answer) for number, answer in zip(target.tolist(), answers, strict=True)
    ]
    batch = solution_batch(samples, tokenizer, model.device)
    logits = model.causal_lm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    logprob = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return passes(torch.where(labels >= 0, logprob, 0).sum(-1), target)


class _Watch(Callback):
    """Takes the points of the curves."""

    curves: Curves

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the policy that nothing has been done to."""
        assert isinstance(pl_module, RLVR)
        self.curves = Curves(lambda: measure(pl_module, pl_module.tokenizer), EVERY)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a batch's entropy."""
        self.curves.add(float(trainer.callback_metrics["entropy/output"]))


def run(method: Method, seed: int, batches: int) -> dict[str, list[float]]:
    """Train a transformer; points of its curves.

    Args:
        method: what steers it.
        seed: of the model, the prompts and the responses.
        batches: of responses, eight to each of 32 prompts.
    """
    transformers_logging.disable_progress_bar()
    model = build(method, "transformer", {"pretrained": warm_start(seed), "seed": seed * 2**20, **OPTIONS})
    watch = _Watch()
    _fit(model, _data(_PROMPTS, 2 * seed + 1), [watch], max_epochs=1, limit_train_batches=batches)
    return watch.curves.points
