"""Language-model training without logits: any Hugging Face causal LM under Lightning."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoConfig

from litropy.callbacks.sigma_reparam_weights import folded_state_dict
from litropy.losses import CutCrossEntropyLoss
from litropy.recipes.causal_lm import CausalLM
from litropy.recipes.evaluation import Evaluation
from litropy.recipes.gradients import Gradients
from litropy.recipes.head_loss import LossOptions
from litropy.recipes.hugging_face_folder import write_folder
from litropy.recipes.model_source import (
    build_config,
    check_vocabulary,
    checkpoint_layers,
    load_pretrained,
    random_model,
)
from litropy.recipes.optimizers import Schedule, adamw, decay_groups, learning_rate_factor
from litropy.recipes.packing_check import isolates_documents
from litropy.recipes.parity import check_parity as check_parity_of
from litropy.recipes.plain_weights import plain_weights
from litropy.recipes.prompts import decode_completions
from litropy.recipes.reparametrisation import reparametrise
from litropy.recipes.sharding import decoder_layers, full_state_dict, is_sharded, shard
from litropy.recipes.state_mismatch import explain_mismatch
from litropy.recipes.strategies import check_strategy
from litropy.recipes.token_normalisation import TokenNormaliser, sum_over_ranks

__all__ = ["LanguageModel"]

_STATS = ("entropy", "argmax")
_SKIP_STATS = ("skipped_mass", "surviving_share")
# metrics that are not named after their statistic
_METRICS = {"entropy": "entropy/output"}
_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


class LanguageModel(LightningModule):
    """Train a Hugging Face causal language model through the fused linear cross-entropy.

    The model comes either from ``config`` (random weights) or from ``pretrained``. Each optimiser step follows the mean
    over all of its targets, whatever the accumulation and the number of ranks.

    Logs a step: ``train/loss`` [nats], ``train/token_accuracy``, ``entropy/output`` [nats], ``train/grad_norm`` (before
    clipping), ``train/learning_rate`` and, with ``skip_tol``, ``train/skipped_mass`` and ``train/surviving_share``; an
    evaluation: ``loss`` and ``entropy`` [nats], ``perplexity`` and
    ``token_accuracy`` under ``val/`` or ``test/``, means over all targets; once: ``data/unigram_entropy`` [nats] if the
    data module knows it.

    Args:
        config: keys of a random model, such as ``{"model_type": "llama", "hidden_size": 64}``, or a JSON file
            with them.
        pretrained: name on the Hugging Face hub, or a folder, of a model to start from; give this or ``config``.
        pad_vocab_to: round the vocabulary size, where it comes from the tokenizer, up to a multiple of this.
        attention: Hugging Face attention implementation (``sdpa``, ``eager``, ``flash_attention_2``); None takes its
            default.
        learning_rate: peak learning rate.
        weight_decay: decay of matrices; biases and norms have none.
        decay_embeddings: whether embeddings decay as well.
        betas: decay rates of AdamW's two moments.
        eps: AdamW's epsilon.
        schedule: learning rate after the warm-up: cosine, wsd (stable, then decay) or constant.
        warmup_steps: optimiser steps of linear warm-up.
        min_learning_rate_ratio: share of the learning rate that is left at the end of cosine or wsd, from 0 to 1.
        decay_share: share of all steps during which wsd decays, from 0 to 1.
        label_smoothing: share of the target's probability that is spread over the vocabulary, from 0 to 1.
        z_loss: weight of the squared log-sum-exp in the loss.
        skip_tol: the largest share of a token's softmax mass that the loss's backward pass may leave out; 0 is exact.
        memory_budget_mib: workspace of the loss, in MiB; on a GPU some GiB buy it one pass less over the head.
        log_stats: log token accuracy and output entropy, from the loss's own pass.
        gradient_checkpointing: recompute decoder layers in the backward pass, to save memory.
        compile: compile the decoder layers with torch.compile.
        check_parity: compare loss and gradients with the model's own on the first batch; off when sharded.
        generation: options of Hugging Face's ``generate`` for predict, such as ``{"max_new_tokens": 64, "do_sample":
            true}``.

    Raises:
        ValueError: if not exactly one of ``config`` and ``pretrained`` is given, or an option is out of its range.
    """

    def __init__(
        self,
        config: dict[str, Any] | Path | None = None,
        pretrained: str | None = None,
        pad_vocab_to: int = 64,
        attention: str | None = None,
        learning_rate: float = 3e-4,
        weight_decay: float = 0.1,
        decay_embeddings: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        schedule: Schedule = "cosine",
        warmup_steps: int = 0,
        min_learning_rate_ratio: float = 0.1,
        decay_share: float = 0.2,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        skip_tol: float = 0.0,
        memory_budget_mib: float = 64,
        log_stats: bool = True,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        check_parity: bool = True,
        generation: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if (config is None) == (pretrained is None):
            raise ValueError(
                "Give either `config` (a model with random weights) or `pretrained` (a name or folder), and not both."
            )
        if pad_vocab_to < 1:
            raise ValueError(
                f"`pad_vocab_to` is {pad_vocab_to}; it must be at least 1, which leaves the vocabulary as it is."
            )
        # bad options should be known before a model is built
        CutCrossEntropyLoss(
            label_smoothing=label_smoothing, z_loss=z_loss, skip_tol=skip_tol, memory_budget_mib=memory_budget_mib
        )
        learning_rate_factor(
            schedule, math.inf if schedule == "constant" else 1, warmup_steps, min_learning_rate_ratio, decay_share
        )
        self.save_hyperparameters(logger=False)
        self.config = config
        self.pretrained = pretrained
        self.pad_vocab_to = pad_vocab_to
        self.attention = attention
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.decay_embeddings = decay_embeddings
        self.betas = betas
        self.eps = eps
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.min_learning_rate_ratio = min_learning_rate_ratio
        self.decay_share = decay_share
        self.loss_options: LossOptions = {
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "skip_tol": skip_tol,
            "memory_budget_mib": memory_budget_mib,
        }
        self.stats = _STATS if log_stats else ()
        self.skip_stats = _SKIP_STATS if skip_tol else ()
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_layers = compile
        self.check_parity = check_parity
        self.generation = dict(generation or {})
        self.model: CausalLM | None = None
        self.evaluations = nn.ModuleDict({stage: Evaluation(log_stats) for stage in ("val", "test")})
        self._normaliser = TokenNormaliser()
        self._first_batch = True
        self._sums: Tensor | None = None
        self._sum_names: list[str] = []
        self._gradients: Gradients | None = None

    # the model

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face model."""
        return self._built.causal_lm

    @property
    def _built(self) -> CausalLM:
        if self.model is None:
            raise ValueError("The model does not exist yet; the trainer builds it, or call `configure_model()`.")
        return self.model

    @property
    def tokenizer(self) -> Any:
        """The data module's tokenizer, or None."""
        datamodule = getattr(self._trainer, "datamodule", None)
        return getattr(datamodule, "tokenizer", None)

    def configure_model(self) -> None:
        """Build the model, and compile and shard it as asked; calling this again changes nothing."""
        if self.model is not None:
            return
        trainer, tokenizer = self._trainer, self.tokenizer
        precision = trainer.precision if trainer is not None else "32-true"
        dtype = _DTYPES.get(precision, torch.float32)
        if self.pretrained is not None:
            causal_lm = load_pretrained(self.pretrained, dtype, self.attention)
        else:
            assert self.config is not None
            seed = torch.initial_seed() if trainer is None else trainer.strategy.broadcast(torch.initial_seed())
            # the weights depend on the seed alone, equal on every rank, and not on what the data module drew before
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                causal_lm = random_model(build_config(self.config, tokenizer, self.pad_vocab_to), dtype, self.attention)
        if tokenizer is not None:
            check_vocabulary(tokenizer, causal_lm)
        causal_lm.train()
        self._adopt(causal_lm, precision)

    def _adopt(self, causal_lm: Any, precision: str) -> None:
        model = reparametrise(CausalLM(causal_lm), self._trainer)
        if self.gradient_checkpointing:
            checkpoint_layers(causal_lm)
        if self.compile_layers:
            for layer in decoder_layers(model.backbone):
                layer.compile()
        if self.device_mesh is not None:
            shard(model, self.device_mesh, precision)
        self.model = model

    def setup(self, stage: str) -> None:
        """Refuse strategies under which the loss or the token mean would be wrong."""
        check_strategy(self.trainer.strategy, self.trainer.accumulate_grad_batches)

    # training

    def on_train_start(self) -> None:
        """Prepare the count of targets, and log what is known about the data."""
        self._normaliser = TokenNormaliser(self.trainer.world_size)
        entropy = getattr(getattr(self.trainer, "datamodule", None), "unigram_entropy", None)
        if entropy is not None and not self.trainer.global_step:
            for logger in self.loggers:
                logger.log_metrics({"data/unigram_entropy": float(entropy)}, step=0)

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Look at the first batch: is the loss the model's own, and do packed documents stay apart?"""
        if not self._first_batch:
            return
        self._first_batch = False
        if is_sharded(self._built) or isinstance(self.trainer.strategy, DeepSpeedStrategy):
            rank_zero_info("Parity check: skipped, because the model is sharded.")
            return
        with self.trainer.precision_plugin.forward_context():
            isolated = "position_ids" not in batch or isolates_documents(self._built)
            errors = check_parity_of(self._built, batch) if self.check_parity else {}
        if not isolated:
            name = type(self.causal_lm).__name__
            rank_zero_warn(f"{name} lets packed documents see one another; pad instead of packing if that matters.")
        if errors:
            worst = max(errors.values())
            rank_zero_info(f"Parity check: loss and gradients are the model's own (relative error {worst:.1g}).")

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of a micro-batch, divided so that the whole step follows the mean over its targets."""
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        num_targets = (batch["labels"][:, 1:] != -100).sum()
        divisor = self._normaliser.divisor(num_targets, first)
        stats = (*self.stats, *self.skip_stats)
        output = self._built(batch, num_items=divisor, **self.loss_options, return_stats=stats)
        totals = output.sums()
        self._sum_names = [_METRICS.get(name, f"train/{name}") for name in totals]
        sums = torch.stack([output.loss.detach() * divisor, num_targets, *totals.values()])
        self._sums = sums if first or self._sums is None else self._sums + sums
        return output.loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Correct the accumulated gradients to the token mean, and log the step."""
        self._gradients = Gradients(self.parameters())
        window = self.trainer.accumulate_grad_batches
        if window > 1:
            self._gradients.scale(self._normaliser.correction(window))
        if self._gradients.tensors:
            self.log("train/grad_norm", self._gradients.norm())
        assert self._sums is not None
        loss, count, *stats = sum_over_ranks(self._sums).unbind()
        self._sums = None
        count = count.clamp(min=1)
        self.log("train/loss", loss / count, prog_bar=True)
        for name, value in zip(self._sum_names, stats, strict=True):
            self.log(name, value / count)
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip with the norm that was computed for the log; works for shards and fused optimisers."""
        # let go of the gradients, which would otherwise outlive the step
        gradients, self._gradients = self._gradients, None
        if not gradient_clip_val or gradients is None:
            return
        if gradient_clip_algorithm == "value":
            gradients.clamp(gradient_clip_val)
        else:
            gradients.clip(gradient_clip_val)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with decay groups and a schedule that is a function of the step."""
        groups = decay_groups([self._built], self.weight_decay, self.decay_embeddings)
        # a gradient scaler leaves unscaling to fused optimisers, which is too late for clipping
        optimizer = adamw(groups, self.learning_rate, self.betas, self.eps, fused=self.trainer.precision != "16-mixed")
        factor = learning_rate_factor(
            self.schedule,
            self.trainer.estimated_stepping_batches if self.schedule != "constant" else math.inf,
            self.warmup_steps,
            self.min_learning_rate_ratio,
            self.decay_share,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    # evaluation and prediction

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the means of the validation set."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the means of the test set."""
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log the means of the validation set."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the means of the test set."""
        self._log_evaluation("test")

    def _evaluate(self, batch: Mapping[str, Tensor], stage: str) -> None:
        output = self._built(batch, router_loss=False, return_stats=self.stats)
        self._evaluation(stage).update(output)

    def _log_evaluation(self, stage: str) -> None:
        # the values are already those of all ranks; the flag only tells Lightning so
        for name, value in self._evaluation(stage).pop().items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "loss", sync_dist=True)

    def _evaluation(self, stage: str) -> Evaluation:
        evaluation = self.evaluations[stage]
        assert isinstance(evaluation, Evaluation)
        return evaluation

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> list[dict[str, str]]:
        """Continue prompts that are padded on the left; one ``{"prompt": ..., "completion": ...}`` a row."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise ValueError("Prediction needs a data module with a `tokenizer`, to turn tokens into text.")
        options: dict[str, Any] = {"synced_gpus": True} if is_sharded(self._built) else {}
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        options |= {"pad_token_id": pad, **self.generation}
        ids, mask = batch["input_ids"], batch["attention_mask"]
        tokens = self._built.generate(input_ids=ids, attention_mask=mask, **options)
        return decode_completions(tokens, ids.shape[1], tokenizer)

    def num_tokens_in_batch(self, batch: Mapping[str, Tensor]) -> int:
        """How many input tokens a batch has, padding included; from its shape, without waiting for the device."""
        return batch["input_ids"].numel()

    # checkpoints

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, config and tokenizer as a Hugging Face folder, adapters merged; every rank must call this.

        Args:
            folder: where to write, in place of an earlier Hugging Face folder; anything else is left alone.

        Raises:
            ValueError: if the folder exists and is no Hugging Face folder, or adapters cannot be merged.
        """
        state = {name.removeprefix("causal_lm."): value for name, value in full_state_dict(self._built).items()}
        try:
            if self._trainer is None or self._trainer.is_global_zero:
                write_folder(self.causal_lm, self.tokenizer, Path(folder), plain_weights(self.causal_lm, state))
        finally:
            # the other ranks wait here, also when writing failed
            if self._trainer is not None:
                self._trainer.strategy.barrier()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the model's config beside its weights."""
        checkpoint["causal_lm_config"] = self.causal_lm.config.to_json_string(use_diff=False)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError that says in one sentence how a checkpoint of another model differs from this one."""
        config = json.loads(checkpoint.get("causal_lm_config", "{}"))
        if self._trainer is None and config:
            # `load_from_checkpoint` knows no tokenizer, but the checkpoint knows its model
            model_type = config.pop("model_type")
            self._adopt(random_model(AutoConfig.for_model(model_type, **config), torch.float32), "32-true")
            checkpoint["state_dict"] = folded_state_dict(checkpoint["state_dict"])
            return
        if "state_dict" in checkpoint and not is_sharded(self._built):
            reason = explain_mismatch(
                self.state_dict(), checkpoint["state_dict"], self.causal_lm.config.to_dict(), config
            )
            if reason:
                raise ValueError(reason)
