"""RL with verifiable rewards, steered by methods that a config puts into slots.

Data flow of one batch of prompts, and where each part lives::

    TaskDataModule        list[Sample], and the Reward that checks            rlvr_samples, rlvr_judging
      -> RolloutEngine    responses, log mu under what was really sampled     rlvr_sampling, steering/sampler
      -> statistics       of the policy and its reference, never N x V        rlvr_policy, rlvr_reference
      -> all ranks        one RolloutBatch, equal on each                     rlvr_ranks, steering/batch
      -> Methods          reward shaping, data selection, advantages          steering/slots (how to add one)
      -> each mini-batch  phase 1: statistics of all its tokens, the loss     rlvr_update
                          phase 2: its cotangents through micro-batches
      -> optimiser step   then controllers take theirs
"""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from litropy.callbacks.policy_readings import PolicyReadings, asked_of_policy
from litropy.recipes.gradients import Gradients
from litropy.recipes.language_model import LanguageModel
from litropy.recipes.optimizers import Schedule, adamw, decay_groups, learning_rate_factor
from litropy.recipes.rlvr_evaluation import PassEvaluation
from litropy.recipes.rlvr_judging import InvalidReward
from litropy.recipes.rlvr_policy import wanted_by
from litropy.recipes.rlvr_ranks import gather_batch, rank_and_ranks, sum_gradients
from litropy.recipes.rlvr_readings import PolicyRecord
from litropy.recipes.rlvr_reference import Reference, ReferenceKind, add_lora
from litropy.recipes.rlvr_rollouts import Judged, mini_batches, respond, rollout_metrics, to_batch, warn_if_off_policy
from litropy.recipes.rlvr_samples import Reward, Sample
from litropy.recipes.rlvr_sampling import HuggingFaceEngine, RolloutEngine
from litropy.recipes.rlvr_trainer import check_options, check_trainer, recomputing, without_sync
from litropy.recipes.rlvr_update import accumulate_gradients, batch_stats
from litropy.recipes.rlvr_warm_start import solution_batch
from litropy.recipes.steering.batch import RolloutBatch
from litropy.recipes.steering.objective import Methods
from litropy.recipes.steering.sampler import Sampler
from litropy.recipes.steering.slots import (
    Advantage,
    AdvantageShaping,
    Aggregation,
    Component,
    DataSelection,
    KLPenalty,
    Mismatch,
    PolicyClip,
    Regulariser,
    RewardShaping,
    TokenMask,
    TokenWeight,
)
from litropy.recipes.steering.states import load_states, named_components, states
from litropy.recipes.token_normalisation import sum_over_ranks

__all__ = ["RLVR"]

_VALIDATION_SEED = 2**40  # apart from those of training
_ROW_ROOM = 2**20  # prompts that a rank may have in a batch
_SLOTS = ("engine", "sampler", "reward", *(field.name for field in fields(Methods)))  # arguments that are objects


class RLVR(LanguageModel):
    """Reinforcement learning with verifiable rewards on a Hugging Face causal language model.

    With its defaults this is GRPO; every argument from ``shaping`` on fills a slot with methods of
    ``litropy.recipes.steering``. The data module gives prompts, a tokenizer and a reward.

    Logs a batch: ``reward/mean``, ``reward/correct``, ``entropy/output`` [nats], ``rollout/length`` [tokens],
    ``rollout/truncated``, ``rollout/equal_reward_groups`` (shares), ``rollout/on_policy_z``, ``rollout/engine_gap``
    [nats a token], ``train/loss`` and its terms, ``train/grad_norm``, ``train/learning_rate``; in validation
    ``val/reward``, ``val/pass_at_1``, ``val/pass_at_k``, ``val/maj_at_k`` and ``val/distinct_correct_at_k``.

    Args:
        config: keys of a random model, such as ``{"model_type": "llama", "hidden_size": 64}``, or a JSON file.
        pretrained: name on the Hugging Face hub, or a folder, of a model to start from; give this or ``config``.
        lora: keys of PEFT's LoraConfig; None trains all weights.
        pad_vocab_to: round the vocabulary size, where it comes from the tokenizer, up to a multiple of this.
        attention: Hugging Face attention implementation; None takes its default.
        learning_rate: peak learning rate of AdamW.
        weight_decay: decay of matrices; biases and norms have none.
        betas: decay rates of AdamW's two moments.
        eps: AdamW's epsilon.
        schedule: learning rate after the warm-up: cosine, wsd (stable, then decay) or constant.
        warmup_steps: optimiser steps of linear warm-up.
        max_grad_norm: norm at which gradients are clipped; 0 leaves them.
        gradient_checkpointing: recompute decoder layers in the backward pass, to save memory.
        warm_start_steps: optimiser steps of supervised learning from the samples' solutions, before RL.
        warm_start_learning_rate: their learning rate; None takes the other.
        warm_start_label_smoothing: share of the solutions' probability that is spread over the vocabulary, from 0 to
            1; it leaves the policy an entropy to explore with.
        group_size: responses to each prompt.
        max_new_tokens: the most tokens of a response.
        mini_batch_size: prompts of an optimiser step, over all ranks; None takes all that were answered.
        micro_batch_size: responses that go through the model at a time; changes speed and memory, nothing else.
        epochs: how often each batch of responses is trained on.
        reference: what KL penalties are taken against: none, frozen (a copy), adapter_off (needs ``lora``).
        val_samples: responses to each prompt in validation, at temperature 1.
        val_k: k of pass@k, maj@k and distinct-correct@k; None takes ``val_samples``.
        invalid_reward: what happens when the reward raises or is no finite number: stop, or count it as wrong.
        seed: of the responses, with the number of the batch.
        engine: writes the responses; None takes Hugging Face generation.
        sampler: how tokens are drawn; None is temperature 1.
        reward: checks responses; None takes the data module's.
        shaping: changes of the reward, one after the other.
        data: chooses what is trained on; None takes all.
        advantage: from rewards; None is GRPO.
        advantage_shaping: changes of the advantage, one after the other.
        masks: which tokens the policy loss is taken over; all must agree.
        weights: of tokens' policy losses; multiplied.
        clip: the surrogate; None is PPO's with 0.2.
        penalties: added to the tokens' losses, each with its coefficient.
        regularisers: added to the loss.
        mismatch: corrects for what the sampler left out; None does not.
        aggregation: how tokens' losses add up; None is the mean over responses of means over tokens.

    Raises:
        ValueError: if an option is out of its range, or the methods do not fit together.
    """

    best_metric = ("val/pass_at_1", "max")  # what the best checkpoint is the best by

    def __init__(
        self,
        config: dict[str, Any] | Path | None = None,
        pretrained: str | None = None,
        lora: dict[str, Any] | None = None,
        pad_vocab_to: int = 64,
        attention: str | None = None,
        learning_rate: float = 1e-6,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
        max_grad_norm: float = 1.0,
        gradient_checkpointing: bool = False,
        warm_start_steps: int = 0,
        warm_start_learning_rate: float | None = None,
        warm_start_label_smoothing: float = 0.0,
        group_size: int = 8,
        max_new_tokens: int = 256,
        mini_batch_size: int | None = None,
        micro_batch_size: int = 64,
        epochs: int = 1,
        reference: ReferenceKind = "none",
        val_samples: int = 8,
        val_k: int | None = None,
        invalid_reward: InvalidReward = "stop",
        seed: int = 0,
        engine: RolloutEngine | None = None,
        sampler: Sampler | None = None,
        reward: Reward | None = None,
        shaping: list[RewardShaping] | None = None,
        data: DataSelection | None = None,
        advantage: Advantage | None = None,
        advantage_shaping: list[AdvantageShaping] | None = None,
        masks: list[TokenMask] | None = None,
        weights: list[TokenWeight] | None = None,
        clip: PolicyClip | None = None,
        penalties: list[KLPenalty] | None = None,
        regularisers: list[Regulariser] | None = None,
        mismatch: Mismatch | None = None,
        aggregation: Aggregation | None = None,
    ) -> None:
        super().__init__(
            config=config,
            pretrained=pretrained,
            pad_vocab_to=pad_vocab_to,
            attention=attention,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            betas=betas,
            eps=eps,
            schedule=schedule,
            warmup_steps=warmup_steps,
            label_smoothing=warm_start_label_smoothing,
            log_stats=False,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.methods = Methods.of(
            shaping=shaping,
            data=data,
            advantage=advantage,
            advantage_shaping=advantage_shaping,
            masks=masks,
            weights=weights,
            clip=clip,
            penalties=penalties,
            regularisers=regularisers,
            mismatch=mismatch,
            aggregation=aggregation,
        )
        self.sampler, self.engine = sampler or Sampler(), engine or HuggingFaceEngine()
        self.wanted = wanted_by(self._components().values())
        check_options(
            self.methods, self.sampler, reference, group_size, mini_batch_size, micro_batch_size, epochs, max_new_tokens
        )
        for name in _SLOTS:  # objects with a state of their own, which is kept elsewhere in the checkpoint
            self._hparams.pop(name, None)
        self.automatic_optimization = False
        self.lora, self.reference_kind, self.reward = lora, reference, reward
        self.warm_start_steps, self.warm_start_learning_rate = warm_start_steps, warm_start_learning_rate
        self.group_size, self.max_new_tokens, self.max_grad_norm = group_size, max_new_tokens, max_grad_norm
        self.mini_batch_size, self.micro_batch_size, self.epochs = mini_batch_size, micro_batch_size, epochs
        self.val_samples, self.invalid_reward, self.seed = val_samples, invalid_reward, seed
        passes = {stage: PassEvaluation(val_samples, val_k or val_samples) for stage in ("val", "test")}
        self.evaluations = nn.ModuleDict(passes)
        self.reference: Reference | None = None
        self._record = PolicyRecord()
        self._rounds, self._tokens, self._warned = 0, 0, False  # rounds are batches of responses

    def _components(self) -> dict[str, Component]:
        return named_components(*self.methods.named(), ("sampler", self.sampler))

    # the model

    def _adopt(self, causal_lm: Any, precision: str) -> None:
        super()._adopt(causal_lm if self.lora is None else add_lora(causal_lm, self.lora), precision)
        self.reference = Reference(self.reference_kind, self._built)

    def setup(self, stage: str) -> None:
        """Refuse strategies, precisions and data modules that this cannot train with."""
        check_trainer(self.trainer)
        if stage == "fit" and self.schedule != "constant" and self.trainer.max_steps < 1:
            raise ValueError(f"schedule {self.schedule!r} needs to know when training ends; set trainer.max_steps.")
        if self.tokenizer is None:
            raise ValueError("RLVR needs a data module with a `tokenizer` and a `reward`, such as TaskDataModule.")
        if self._reward is None:
            raise ValueError("Nothing checks the responses: give `reward`, or a data module that has one.")

    @property
    def _reward(self) -> Reward | None:
        return self.reward or getattr(getattr(self.trainer, "datamodule", None), "reward", None)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW; its schedule begins when the warm start ends."""
        groups = decay_groups([self._built], self.weight_decay, self.decay_embeddings)
        optimizer = adamw(groups, self.learning_rate, self.betas, self.eps)
        total = math.inf if self.schedule == "constant" else max(1, self.trainer.max_steps - self.warm_start_steps)
        factor = learning_rate_factor(
            self.schedule, total, self.warmup_steps, self.min_learning_rate_ratio, self.decay_share
        )
        warm, start = (self.warm_start_learning_rate or self.learning_rate) / self.learning_rate, self.warm_start_steps
        schedule = LambdaLR(optimizer, lambda step: warm if step < start else factor(step - start))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # training

    def on_train_start(self) -> None:
        """Nothing of what a language model's training prepares."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Nothing of what a language model's training looks at."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Gradients are complete and clipped by now."""

    def training_step(self, batch: list[Sample], batch_idx: int) -> None:  # type: ignore[override]
        """Learn from a batch of prompts: from their solutions while the warm start lasts, then from rewards."""
        self._built.eval()  # dropout would make the two phases of an update differ
        with without_sync(self.trainer.strategy.model):
            if self.trainer.global_step < self.warm_start_steps:
                self._learn_solutions(batch)
            else:
                self._learn_from_rewards(batch)

    def _learn_solutions(self, samples: list[Sample]) -> None:
        batch = solution_batch(samples, self.tokenizer, self.device)
        count = sum_over_ranks((batch["labels"] != -100).sum())
        with recomputing(self._built, self.gradient_checkpointing):
            output = self._built(batch, num_items=count.clamp(min=1), **self.loss_options)
            self.manual_backward(output.loss)
        self._tokens = batch["input_ids"].numel()
        self._step()
        self.log("train/loss", sum_over_ranks(output.loss.detach().clone()), prog_bar=True)

    def _learn_from_rewards(self, samples: list[Sample]) -> None:
        rollouts = self._collect(samples)
        if rollouts is None:
            return
        advantage = self.methods.advantages(rollouts)
        for epoch in range(self.epochs):
            for place, rows in enumerate(mini_batches(rollouts, self.mini_batch_size)):
                if 0 <= self.trainer.max_steps <= self.trainer.global_step:
                    break
                with recomputing(self._built, self.gradient_checkpointing):
                    found, seen = accumulate_gradients(
                        self._built,
                        self.methods,
                        rollouts[rows],
                        advantage[rows],
                        wanted=self.wanted,
                        micro_batch_size=self.micro_batch_size,
                        unchanged=not (epoch or place or (self.methods.data and self.methods.data.stale)),
                        backward=self.manual_backward,
                    )
                self._step()
                for component in self._components().values():
                    component.after_step(seen)
                self._record.add(found, seen)
        for name, value in self._record.means().items():
            self.log(f"train/{name}", value, prog_bar=name == "loss")

    def _collect(self, samples: list[Sample]) -> RolloutBatch | None:
        """Responses of all ranks, judged, with statistics; None if the data slot waits for more."""
        assert self.reference is not None
        if not self._rounds:
            self.reference.renew(self._built)
        place = self._rounds * rank_and_ranks()[1] + rank_and_ranks()[0]
        judged = self._respond(samples, self.sampler, self.group_size, self.seed + place)
        # numbers rise with the round, and leave room for ranks with more prompts than this one
        rollouts = to_batch(judged, place * _ROW_ROOM * self.group_size)
        self._rounds += 1
        self._tokens = rollouts.prompts.numel() + rollouts.responses.numel()
        wanted = self.wanted.beside("varentropy", *asked_of_policy(self.trainer))
        stats = batch_stats(self._built, rollouts, wanted, self.micro_batch_size)
        reference = self.reference.logprobs(self._built, rollouts, self.micro_batch_size)
        rollouts = gather_batch(replace(rollouts, stats=stats, reference=reference))
        self._record.begin(self.trainer.global_step, samples, judged, rollouts)
        metrics = rollout_metrics(rollouts)
        self.log_dict(metrics)
        if not (self._warned or self.sampler.truncates):
            self._warned = warn_if_off_policy(float(metrics["rollout/on_policy_z"]))
        rollouts = self.methods.shaped(rollouts)
        return rollouts if self.methods.data is None else self.methods.data.select(rollouts)

    def policy_readings(self) -> PolicyReadings | None:
        """The latest batch of responses and its updates, for callbacks that watch the policy; None before the first."""
        return self._record.readings

    def _respond(self, samples: list[Sample], sampler: Sampler, group_size: int, seed: int) -> Judged:
        self._built.eval()
        reward = self._reward
        assert reward is not None
        return respond(
            self._built,
            self.engine,
            sampler,
            samples,
            reward,
            self.tokenizer,
            group_size=group_size,
            max_new_tokens=self.max_new_tokens,
            seed=seed,
            invalid=self.invalid_reward,
        )

    def _step(self) -> None:
        """Sum gradients over ranks, clip, and take an optimiser step."""
        sum_gradients(self._built.parameters())
        gradients = Gradients(self._built.parameters())
        if gradients.tensors:
            self.log("train/grad_norm", gradients.norm())
            if self.max_grad_norm:
                gradients.clip(self.max_grad_norm)
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    # evaluation

    def _evaluate(self, batch: Any, stage: str) -> None:
        evaluation: Any = self.evaluations[stage]
        rank, ranks = rank_and_ranks()
        if batch:  # else this rank has no prompt left
            seed = _VALIDATION_SEED + evaluation.batches * ranks + rank
            evaluation.update(self._respond(batch, Sampler(), self.val_samples, seed).results)

    def _log_evaluation(self, stage: str) -> None:
        evaluation: Any = self.evaluations[stage]
        for name, value in evaluation.pop().items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "pass_at_1", sync_dist=True)

    def num_tokens_in_batch(self, batch: Any) -> int:
        """How many tokens of prompts and responses the last batch had, padding included."""
        return self._tokens

    # checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what methods and sampler remember, and the number of batches of responses."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["rlvr"] = {"rounds": self._rounds, "states": states(self._components())}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from there; methods that the checkpoint does not know start anew."""
        super().on_load_checkpoint(checkpoint)
        found = checkpoint.get("rlvr")
        if found and self._trainer is not None:  # a model that is loaded alone has none of the methods
            self._rounds = found["rounds"]
            load_states(self._components(), found["states"])
