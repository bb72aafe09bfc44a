"""Measure how certain a language model is of its next token."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from litropy.callbacks.collapse_readings import Readings
from litropy.callbacks.likelihood_over_optimisation import LikelihoodOverOptimisation
from litropy.callbacks.logged_steps import is_logged_step
from litropy.callbacks.on_policy_score import OnPolicyScore
from litropy.callbacks.output_entropy import OutputSums
from litropy.callbacks.output_entropy_logits import find_heads
from litropy.callbacks.output_entropy_probe import OutputProbe
from litropy.callbacks.output_entropy_trend import OutputTrend
from litropy.callbacks.step_begun import step_begun
from litropy.callbacks.uncompiled import is_compiled, uncompiled

__all__ = ["OutputEntropyMonitor"]

# probes that may wait for a step at which Lightning waits for the device anyway
_MOST_WAITING = 64


class OutputEntropyMonitor(Callback):
    r"""Measure the output distribution p of a language model at the tokens that it is trained on.

    At a probe it logs these means over tokens (of all ranks and micro-batches of the optimiser step):

    - ``entropy/output``, :math:`H = -\sum p \ln p` [nats], from 0 to ln V; left to the module if it logs that itself;
    - ``entropy/output_varentropy``, :math:`\sum p (\ln p + H)^2` [nats²]: 0 for a sure or a uniform distribution, large
      where a few likely tokens stand before a long tail;
    - ``entropy/output_top10``, entropy of the ten likeliest tokens, renormalised [nats], from 0 to ln 10;
      ``entropy/output_top10_raw``, their :math:`-\sum p \ln p` without that; ``entropy/output_top10_mass``, their
      probability: it falls when probability goes to unlikely tokens;
    - ``entropy/output_max_probability``, of the likeliest token, from 0 to 1;
    - ``entropy/lse``, :math:`\ln \sum e^z`, and ``entropy/lse_drift``, its change since the first probe: logits that
      all move together change no probability, but cost digits in half precision; ``z_loss`` holds them;
    - ``entropy/calibration_gap``, cross-entropy less entropy [nats]: above 0 the model is surer than it is right, below
      0 less sure, and far below 0 on text that it knows by heart;
    - ``entropy/on_policy_z`` if ``on_policy``: within ±4 if the tokens were drawn from p, see ``OnPolicyScore``;
    - ``entropy/over_optimisation`` if ``over_optimisation``: 1 after the turning point of the top-k entropy, see
      ``LikelihoodOverOptimisation``; else 0;
    - ``entropy/output_probe_ms``: what the monitor's own passes cost on this rank, of the latest probe that is known.

    Where the module takes its loss from ``linear_cross_entropy`` or ``linear_head_stats`` (as ``LanguageModel`` and
    ``patch_causal_lm`` do), all but top-k comes from the loss's own pass, of every token, and top-k from ``rows``
    random ones that pass the head again: of a batch of more than 512 a quarter at most, else up to 128. In a model with
    its own loss everything comes from a sample of ``rows``, of the final logits that the model has computed. Tokens
    without a target do not count; if the model is called without ``labels``, the next of its ``input_ids`` is the
    target. Only passes of the training step count that gradients flow through: neither generation nor a frozen
    reference model. Nothing waits for the device, but at logged steps. Passing the head again is at most a twelfth of a
    step's operations from 512 tokens on. The mean of 512 tokens has a standard error of 4 % of the spread between
    tokens.

    Args:
        every_n_steps: optimiser steps from one probe to the next.
        dense_steps: every one of a run's first steps up to this is probed.
        rows: tokens that a probe samples, of all ranks and micro-batches together.
        top_k: how many likeliest tokens the top-k statistics take, 1 to 64.
        on_policy: the training text is sampled from the model itself: log ``entropy/on_policy_z``, and warn beyond ±4.
        over_optimisation: watch for the turning point of the top-k entropy, and warn: for training on preferences, or
            for many epochs of few data.
        temperature: what the logits of a model with its own loss are divided by: the sampling temperature of the text.
        head: dotted name of the module that gives logits, in a LightningModule that is no Hugging Face model and does
            not take its loss from this package.

    Raises:
        ValueError: if a number is out of its range; when training starts, if there is no module named ``head``; at a
            probe, if the training step calls the head of a model alone that changes its logits afterwards.

    Example::

        trainer = Trainer(callbacks=[OutputEntropyMonitor(), CollapseDetector()])

    Reference: Shi et al., arXiv 2410.11677, section 5 (top-k); Wortsman et al., arXiv 2309.14322, section 3.1 (lse).
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        dense_steps: int = 100,
        rows: int = 512,
        top_k: int = 10,
        on_policy: bool = False,
        over_optimisation: bool = False,
        temperature: float = 1.0,
        head: str | None = None,
    ) -> None:
        limits = (("every_n_steps", every_n_steps, 1), ("dense_steps", dense_steps, 0), ("rows", rows, 1))
        for name, value, least in limits:
            if value < least:
                raise ValueError(f"`{name}` is {value}; it must be at least {least}.")
        if not 1 <= top_k <= 64:
            raise ValueError(f"`top_k` is {top_k}; it must be in 1 to 64.")
        if not temperature > 0:
            raise ValueError(f"`temperature` is {temperature}; it must be positive.")
        self.every_n_steps = every_n_steps
        self.dense_steps = dense_steps
        self.rows = rows
        self.top_k = top_k
        self.on_policy = on_policy
        self.over_optimisation = over_optimisation
        self.temperature = temperature
        self.head = head
        self.trend = OutputTrend()
        self.score = OnPolicyScore()
        self.turning_point = LikelihoodOverOptimisation()
        self._warned_of_score = self._warned_of_nothing = False
        self._waiting: list[tuple[int, Tensor]] = []
        self._probe: OutputProbe | None = None
        self._compiled = False
        self._logs_entropy: bool | None = None
        self._step, self._micro_batch = -1, 0
        self._open = ExitStack()
        self._begun: Callable[[], bool] = lambda: False
        self._in_backward = False
        self._readings: Readings | None = None

    def collapse_readings(self) -> Readings | None:
        """Return the latest probe, for ``CollapseDetector``."""
        return self._readings

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find output heads."""
        places = find_heads(pl_module, self.head)
        modules = (module for place in places for module in (place.head, *place.around))
        self._compiled = is_compiled([pl_module, *modules])
        # neither checks that a module makes before its step, nor what is recomputed in the backward pass
        self._probe = OutputProbe(
            places,
            pl_module.device,
            self.top_k,
            self.temperature,
            lambda: self._begun() and not self._in_backward,
        )
        self._readings, self._logs_entropy, self._step = None, None, -1

    def is_due(self, step: int) -> bool:
        """Whether an optimiser step is probed.

        Example::

            >>> monitor = OutputEntropyMonitor(every_n_steps=10, dense_steps=3)
            >>> [step for step in range(25) if monitor.is_due(step)]
            [0, 1, 2, 10, 20]
        """
        return step < self.dense_steps or step % self.every_n_steps == 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch if this step is probed."""
        step = trainer.global_step
        self._open.close()  # still open if the batch before was left out
        if self._probe is None or not self.is_due(step):
            return
        if step != self._step:
            self._step, self._micro_batch = step, 0
            self._probe.take()
        rows = -(-self.rows // (trainer.world_size * trainer.accumulate_grad_batches))
        if self._compiled:
            self._open.enter_context(uncompiled())
        self._begun, self._in_backward = step_begun(trainer), False
        self._open.enter_context(self._probe.open(rows, step * 1009 + self._micro_batch))
        self._micro_batch += 1

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Take logits that the training step computed by hand, while they are there."""
        if self._probe is not None:
            self._probe.flush()
        self._in_backward = True

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on watching: a step that optimises by hand may call the model again."""
        self._in_backward = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop watching; when the optimiser step is complete, publish what was seen."""
        probed = self._probe is not None and self._step >= 0
        if self._probe is not None and probed:
            self._probe.flush()
            self._open.close()
            probed = trainer.global_step != self._step
            if probed:
                self._publish(trainer, pl_module, self._probe)
                self._step = -1
        if is_logged_step(trainer) or len(self._waiting) >= _MOST_WAITING:
            self._judge()
        if probed and self.over_optimisation:
            pl_module.log("entropy/over_optimisation", torch.tensor(float(self.turning_point.level)))

    def _publish(self, trainer: Trainer, pl_module: LightningModule, probe: OutputProbe) -> None:
        seen = probe.take()
        if seen is None and not self._warned_of_nothing:
            self._warned_of_nothing = True
            rank_zero_warn(
                f"OutputEntropyMonitor saw no logits at step {self._step}: the training step called no output head that"
                " it knows, or let no gradient through it. Name the module that gives logits by `head`, or take the"
                " loss from `linear_cross_entropy`."
            )
        if seen is None and trainer.world_size == 1:
            return
        with probe.clock.running():
            sums = _over_data_ranks(pl_module, seen)
            values = self.trend.update(sums)
            z = self.score.update(sums.excess, sums.excess_variance)
        if self.on_policy or self.over_optimisation:
            self._waiting.append((self._step, torch.stack([values["top_entropy_raw"], values["top_mass"], z])))
        self._readings = self._as_readings(values, probe.has_targets)
        if self._logs_entropy is None:
            self._logs_entropy = "entropy/output" not in trainer.callback_metrics
        for name, value in self._named(values, z, probe.has_targets).items():
            pl_module.log(name, value)
        cost = probe.clock.take()
        if cost is not None:
            # from the host to a device would wait for it
            pl_module.log("entropy/output_probe_ms", torch.tensor(cost), rank_zero_only=True)

    def _as_readings(self, values: dict[str, Tensor], has_targets: bool) -> Readings:
        published = {"output/entropy": values["entropy"]}
        if has_targets and not self.on_policy:  # a policy is not trained towards its own samples
            published["output/cross_entropy"] = values["cross_entropy"]
        return Readings(self._step, published)

    def _named(self, values: dict[str, Tensor], z: Tensor, has_targets: bool) -> dict[str, Tensor]:
        top = f"entropy/output_top{self.top_k}"
        named = {
            "entropy/output_varentropy": values["varentropy"],
            top: values["top_entropy"],
            f"{top}_raw": values["top_entropy_raw"],
            f"{top}_mass": values["top_mass"],
            "entropy/output_max_probability": values["max_probability"],
            "entropy/lse": values["lse"],
            "entropy/lse_drift": values["lse_drift"],
        }
        if self._logs_entropy:
            named["entropy/output"] = values["entropy"]
        if has_targets:
            named["entropy/calibration_gap"] = values["calibration_gap"]
        if has_targets and self.on_policy:
            named["entropy/on_policy_z"] = z
        return named

    def _judge(self) -> None:
        """Fetch the probes that wait, in one copy, and warn of what is new."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        numbers = torch.stack([probe for _, probe in waiting]).tolist()
        for (step, _), (entropy, mass, z) in zip(waiting, numbers, strict=True):
            message = self.turning_point.update(step, entropy, mass) if self.over_optimisation else None
            if message is not None:
                rank_zero_warn(f"At step {step}, {message}.")
            message = self.score.judge(z) if self.on_policy and not self._warned_of_score else None
            if message is not None:
                self._warned_of_score = True
                rank_zero_warn(f"At step {step}, {message}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self._open.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the last probes, and forget the model."""
        self._open.close()
        self._judge()
        self._probe = None

    def state_dict(self) -> dict[str, Any]:
        """What later values and warnings depend on."""
        self._judge()
        return {
            "trend": self.trend.state_dict(),
            "score": self.score.state_dict(),
            "turning_point": self.turning_point.state_dict(),
            "warned": [self._warned_of_score, self._warned_of_nothing],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.trend.load_state_dict(state_dict["trend"])
        self.score.load_state_dict(state_dict["score"])
        self.turning_point.load_state_dict(state_dict["turning_point"])
        self._warned_of_score, self._warned_of_nothing = state_dict["warned"]


def _over_data_ranks(pl_module: LightningModule, sums: OutputSums | None) -> OutputSums:
    """Sums over the ranks that have different data."""
    if sums is None:
        sums = OutputSums.of(tokens=torch.zeros((), device=pl_module.device))
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return sums
    mesh, group = pl_module.device_mesh, None
    if mesh is not None and "data_parallel" in (mesh.mesh_dim_names or ()):
        group = mesh["data_parallel"].get_group()
    total = torch.stack(sums)
    dist.all_reduce(total, group=group)
    return OutputSums(*total.unbind())
