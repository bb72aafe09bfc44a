"""What a run is, before it starts, and what came of it, when it ends."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.text import Text

from litropy.callbacks.logged_steps import total_steps
from litropy.callbacks.progress_bar import format_count, format_duration
from litropy.callbacks.throughput import peak_memory_mib
from litropy.losses.head_inputs import resolve_impl

__all__ = ["RunReport", "first_screen", "summary"]

_OUTPUTS = {
    "metrics": "metrics.csv",
    "curves": "curves.png",
    "checkpoints": "checkpoints",
    "Hugging Face": "hugging_face",
}


def first_screen(trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:
    """Describe a fit that is about to start, as short lines under a name each."""
    parameters = list(pl_module.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in parameters) - trained
    lines = {
        "device": _device(trainer),
        "precision": str(trainer.precision),
        "loss": _loss(pl_module),
        "model": f"{_model_name(pl_module)}, {format_count(trained + frozen)} parameters"
        + (f" ({format_count(frozen)} of them frozen)" if frozen else ""),
        "batch": _batch(trainer),
        "data": _data(trainer),
        "steps": _steps(trainer),
        "run folder": str(trainer.log_dir or "none: nothing is logged"),
    }
    return {name: line for name, line in lines.items() if line}


def _device(trainer: Trainer) -> str:
    root = trainer.strategy.root_device
    if root.type == "cuda":
        name = torch.cuda.get_device_name(root)
        memory = torch.cuda.get_device_properties(root).total_memory / 2**30
        text = f"{name} ({memory:.0f} GiB)"
    else:
        text = f"{root.type.upper()}, {torch.get_num_threads()} threads"
    if trainer.world_size > 1:
        return f"{trainer.world_size} x {text}, {type(trainer.strategy).__name__}"
    return text


def _loss(pl_module: LightningModule) -> str:
    if not hasattr(pl_module, "causal_lm"):
        return ""
    parameter = next(pl_module.parameters())
    impl = resolve_impl("auto", parameter.device, parameter.dtype)
    return f"fused linear cross-entropy, {'Triton' if impl == 'triton' else 'PyTorch'} implementation; no logits stored"


def _model_name(pl_module: LightningModule) -> str:
    config = getattr(getattr(pl_module, "causal_lm", None), "config", None)
    kind = getattr(config, "model_type", None)
    name = type(pl_module).__name__
    if kind is None:
        return name
    layers, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    return f"{name} {kind}" + (f", {layers} x {width}" if layers and width else "")


def _batch(trainer: Trainer) -> str:
    data: Any = getattr(trainer, "datamodule", None)
    size, length = getattr(data, "batch_size", None), getattr(data, "sequence_length", None)
    if not size or not length:
        return ""
    factors = [f"{size} sequences of {length}"]
    ranks = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
    if ranks > 1:
        factors.append(f"{ranks} devices")
    if trainer.accumulate_grad_batches > 1:
        factors.append(f"{trainer.accumulate_grad_batches} accumulated")
    tokens = size * length * ranks * trainer.accumulate_grad_batches
    return f"{tokens:,} tokens a step ({' x '.join(factors)})"


def _data(trainer: Trainer) -> str:
    data: Any = getattr(trainer, "datamodule", None)
    if data is None:
        return ""
    parts = []
    for name, label in (("num_documents", "documents"), ("num_tokens", "tokens")):
        if getattr(data, name, None):
            parts.append(f"{format_count(getattr(data, name))} {label}")
    if getattr(data, "vocab_size", None):
        parts.append(f"vocabulary {data.vocab_size:,}")
    if getattr(data, "unigram_entropy", None) is not None:
        parts.append(f"unigram entropy {data.unigram_entropy:.3f} nats")
    return ", ".join(parts) or type(data).__name__


def _steps(trainer: Trainer) -> str:
    total = total_steps(trainer)
    text = f"{int(total):,}" if math.isfinite(total) else "without limit"
    return f"{text}, going on from {trainer.global_step:,}" if trainer.global_step else text


def summary(
    trainer: Trainer, seconds: float, steps: int, tokens: int, unigram_entropy: float | None, peak_mib: float
) -> dict[str, str]:
    """Describe a fit that has ended.

    Args:
        trainer: the trainer, with the last metrics.
        seconds: wall-clock time of the fit.
        steps: optimiser steps of this fit, without those before a checkpoint it went on from.
        tokens: input tokens of this fit, of all ranks.
        unigram_entropy: entropy of the held-out tokens under the unigram model of the training data, in nats, if known.
        peak_mib: peak memory in MiB.
    """
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    lines = {
        "steps": f"{trainer.global_step:,}" + (f" ({steps:,} of them now)" if steps != trainer.global_step else ""),
        "tokens": f"{format_count(tokens)} in {format_duration(seconds)}",
    }
    if "train/loss" in values:
        lines["train loss"] = f"{values['train/loss']:.4f} nats"
    if "val/loss" in values:
        loss = values["val/loss"]
        lines["held-out loss"] = f"{loss:.4f} nats, perplexity {math.exp(min(loss, 700)):.4g}"
        if unigram_entropy is not None:
            side = "below" if loss <= unigram_entropy else "above"
            distance = abs(unigram_entropy - loss)
            lines["unigram entropy"] = f"{unigram_entropy:.4f} nats; the held-out loss is {distance:.4f} {side} it"
    lines["peak memory"] = f"{peak_mib:,.0f} MiB"
    folder = Path(trainer.log_dir) if trainer.log_dir else None
    if folder is not None:
        lines |= {name: str(folder / file) for name, file in _OUTPUTS.items() if (folder / file).exists()}
    return lines


class RunReport(Callback):
    """Print what is about to run, and at the end a table of what came of it.

    Put it after the callbacks that write files, so that the table lists them.

    Example::

        trainer = Trainer(callbacks=[RunReport()])
    """

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self._started = 0.0
        self._first_step = 0
        self._tokens = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the first screen."""
        self._started, self._first_step, self._tokens = time.perf_counter(), trainer.global_step, 0
        lines = first_screen(trainer, pl_module)
        if trainer.is_global_zero:
            self._print(lines)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count tokens."""
        count = getattr(pl_module, "num_tokens_in_batch", None)
        self._tokens += count(batch) if count is not None else 0

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary."""
        steps = trainer.global_step - self._first_step
        if not self._started or not trainer.is_global_zero:
            return
        ranks = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
        entropy = getattr(getattr(trainer, "datamodule", None), "unigram_entropy", None)
        seconds = time.perf_counter() - self._started
        peak = peak_memory_mib(trainer.strategy.root_device)
        self._print(summary(trainer, seconds, steps, self._tokens * ranks, entropy, peak))

    def _print(self, lines: dict[str, str]) -> None:
        width = max(map(len, lines))
        rows = [Text.assemble((name.ljust(width), "bold"), f"  {line}") for name, line in lines.items()]
        self.console.print("", *rows, "", sep="\n")
