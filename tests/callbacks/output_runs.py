"""Modules and runs that the tests of the output monitor share."""

import copy

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from litropy.callbacks.output_entropy import logit_statistics

# names of the monitor's means, and how to get each from every token's statistics
MEANS = {
    "entropy/output": lambda s: s.entropy,
    "entropy/output_varentropy": lambda s: s.varentropy,
    "entropy/output_top10": lambda s: s.topk_entropy,
    "entropy/output_top10_raw": lambda s: s.topk_mass * (s.topk_entropy - s.topk_mass.log()),
    "entropy/output_top10_mass": lambda s: s.topk_mass,
    "entropy/output_max_probability": lambda s: s.max_logprob.exp(),
    "entropy/lse": lambda s: s.lse,
    "entropy/calibration_gap": lambda s: -s.logprob - s.entropy,
}


class OwnLoss(pl.LightningModule):
    """A Hugging Face model that computes its own loss."""

    def __init__(self, model, learning_rate=0.0):
        super().__init__()
        self.model, self.learning_rate = model, learning_rate

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.learning_rate)


class Record(pl.Callback):
    """Keeps what was logged under ``entropy/``, a step."""

    def __init__(self):
        self.logged = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step > len(self.logged):
            values = trainer.callback_metrics.items()
            self.logged.append({name: float(value) for name, value in values if name.startswith("entropy/")})


def batch_of(targets, seed=0, vocabulary=101, length=12):
    """Sequences of which only the last tokens are targets, as many as asked for each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (len(targets), length), generator=generator)
    labels = ids.clone()
    for row, count in enumerate(targets):
        labels[row, : length - count] = -100
    return {"input_ids": ids, "labels": labels}


def fit(module, batches, *callbacks, **options):
    """Train on the batches, once each and in order."""
    quiet = {"logger": False, "enable_checkpointing": False}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=list(callbacks), **(quiet | options))
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return trainer


def true_means(model, batches, temperature=1.0):
    """The monitor's means from all logits in float64, of all the batches' targets."""
    model = copy.deepcopy(model).double()
    stats, targets = [], []
    for batch in batches:
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1) / temperature
        target = batch["labels"][:, 1:].flatten()
        stats.append(logits[target >= 0])
        targets.append(target[target >= 0])
    found = logit_statistics(torch.cat(stats), torch.cat(targets), 10)
    return {name: float(value(found).mean()) for name, value in MEANS.items()}
