"""Keep attention logits from running away: scale a head's queries and keys when they have grown too large."""

from contextlib import ExitStack
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from litropy.callbacks.attention_call import AttentionCall
from litropy.callbacks.attention_capture import capture_attention, path_in_model
from litropy.callbacks.collapse_alarm import Alarm
from litropy.callbacks.qk_clip_weights import ScaledRows, clip_factors, has_qk_norm, query_key_rows, scale_rows
from litropy.callbacks.uncompiled import is_compiled, uncompiled

__all__ = ["QKClip"]

# attention over a few thousand keys can be one-hot at logits that a limit above this leaves alone
_NO_GUARD_OF_ENTROPY = 20.0


class QKClip(Callback):
    r"""Scale queries and keys of heads whose largest attention logit exceeds a limit, after the optimiser step.

    With :math:`S_\max` the largest raw logit (scaled, not soft-capped) of a head in the step's batches, on all ranks,
    and :math:`\gamma = \min(1, \tau / S_\max)`, the rows of :math:`W_q` and :math:`W_k` (and biases) that make the head
    are multiplied by :math:`\sqrt\gamma`. Where heads share keys (GQA, MQA), only :math:`W_q` is, by :math:`\gamma`; in
    multi-head latent attention (MLA), content parts are by :math:`\sqrt\gamma` and rotary queries by :math:`\gamma`, as
    all heads share the rotary key. The optimiser's moments stay as they are.

    The default limit of 100 guards against runaway logits, not against collapse: a softmax over T keys is one-hot in
    all but name once one logit leads by :math:`\ln T + 2.7`, which is 10 for 2048 keys. To keep entropy, choose a limit
    of 10 to 20, or ``SigmaReparam``. Layers that normalise queries or keys are left alone: the norm would undo the
    scaling.

    As one of a ``CollapseDetector``'s actions it clips after each of the ``alarm_steps`` steps that follow an alarm;
    else after every step. Logs ``qk_clip/max_logit``, the largest logit of all heads before clipping, and
    ``qk_clip/clipped_heads``. Measuring all rows costs about half of attention's forward pass; compiled models break
    their graph at attention, and run uncompiled in the steps that follow an alarm.

    Args:
        tau: the largest logit that is left alone.
        rows: query rows of each sequence to measure, evenly spaced; None takes all.
        level: lowest level of alarms to act on: 1 or 2.
        alarm_steps: for how many optimiser steps an alarm makes it clip.

    Raises:
        ValueError: if an option is out of its range; in the first step, if no attention is seen, or a layer's weights
            are not understood, frozen or reparametrised.

    Example::

        trainer = Trainer(callbacks=[QKClip(tau=20)])

    Reference: Kimi Team 2025, "Kimi K2: Open Agentic Intelligence", section 2.1, algorithm 1.
    """

    def __init__(
        self, tau: float = 100.0, rows: int | None = None, level: Literal[1, 2] = 2, alarm_steps: int = 1
    ) -> None:
        if not tau > 0:
            raise ValueError(f"`tau` is {tau}; it must be positive.")
        if rows is not None and rows < 1:
            raise ValueError(f"`rows` is {rows}; it must be at least 1, or None for all.")
        if alarm_steps < 1:
            raise ValueError(f"`alarm_steps` is {alarm_steps}; it must be at least 1.")
        self.tau = tau
        self.rows = rows
        self.level = level
        self.alarm_steps = alarm_steps
        self._on_alarm = False
        self._steps_left = 0
        self._watching = False
        self._handles: list[RemovableHandle] = []
        self._open = ExitStack()
        self._forget()

    def _forget(self) -> None:
        self._weights: dict[str, list[ScaledRows]] = {}
        self._heads: dict[str, int] = {}
        self._max_logits: dict[str, Tensor] = {}
        self._seen: set[str] = set()
        self._agreed = False
        self._metrics: dict[str, Tensor] = {}

    @property
    def state_key(self) -> str:
        """One state for each limit, as a guard and a remedy may be used together."""
        return self._generate_state_key(tau=self.tau)

    def act(self, alarm: Alarm, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clip after the next optimiser steps."""
        if alarm.level >= self.level:
            self._steps_left = self.alarm_steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See whether this is an alarm's remedy."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._on_alarm = any(self in getattr(callback, "actions", ()) for callback in callbacks)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clip after each optimiser step; without an alarm to wait for, watch attention from now on."""
        self._close()
        self._forget()
        mesh = pl_module.device_mesh
        if mesh is not None and "tensor_parallel" in (mesh.mesh_dim_names or ()) and mesh["tensor_parallel"].size() > 1:
            raise ValueError("QKClip needs all heads on each rank; set tensor_parallel_size to 1.")

        def after_step(*arguments: Any) -> None:
            if self._watching:
                self._clip(pl_module)

        self._handles = [optimizer.register_step_post_hook(after_step) for optimizer in trainer.optimizers]
        if not self._on_alarm:
            self._watch(pl_module)
        if self.tau > _NO_GUARD_OF_ENTROPY:
            rank_zero_info(
                f"QKClip: tau={self.tau:g} keeps logits from running away, but not attention entropy, which can be gone"
                " at logits of 10; for that, take tau=20 or less, or SigmaReparam."
            )

    def _watch(self, pl_module: LightningModule) -> None:
        self._open.enter_context(capture_attention(pl_module, self._measure, recomputations=True))
        self._watching = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """After an alarm, watch the attention of some steps; and of the very first, to see if it can be clipped."""
        self._seen = set()
        due = self._steps_left > 0 or not self._agreed
        if due and not self._watching and batch_idx % trainer.accumulate_grad_batches == 0:
            if is_compiled(pl_module.modules()):
                self._open.enter_context(uncompiled())
            self._watch(pl_module)

    @torch.no_grad()
    def _measure(self, call: AttentionCall) -> None:
        """Take the largest logits of a call; what checkpointing repeats counts only if the first pass was not seen."""
        name, repeated = call.name, call.recomputed and call.name in self._seen
        if not call.recomputed:
            self._seen.add(name)
        if name not in self._weights and not self._agreed:
            self._learn(name, call.module, call.q.shape[1], call.q.device)
        if repeated or not self._weights.get(name):
            return
        rows = None
        if self.rows is not None and self.rows < call.q.shape[2]:
            rows = torch.linspace(0, call.q.shape[2] - 1, self.rows, device=call.q.device).long()
        stats = call.stats(rows)
        largest = stats.max_raw_logit.masked_fill(stats.visible_keys == 0, -torch.inf).amax((0, 2)).float()
        before = self._max_logits.get(name)
        self._max_logits[name] = largest if before is None else torch.maximum(before, largest)

    def _learn(self, name: str, module: nn.Module, num_heads: int, device: torch.device) -> None:
        """Find the weights of a layer that is seen for the first time."""
        self._heads[name] = num_heads
        if not has_qk_norm(module):
            self._weights[name] = [rows.to(device) for rows in query_key_rows(module, num_heads)]
            return
        if all(self._weights.values()):
            rank_zero_warn(
                f"QKClip does nothing to {name} and layers like it: they normalise queries or keys, which bounds"
                " their logits already and would undo any scaling of weights."
            )
        self._weights[name] = []

    def _agree(self, pl_module: LightningModule) -> None:
        """After the first step, know the layers that any rank has seen."""
        self._agreed = True
        if _num_ranks() > 1:
            heads: list[Any] = [None] * _num_ranks()
            dist.all_gather_object(heads, self._heads)
            modules = {path_in_model(name): module for name, module in pl_module.named_modules()}
            for name, number in {name: number for rank in heads for name, number in rank.items()}.items():
                if name not in self._weights:
                    self._learn(name, modules[name], number, pl_module.device)
            self._heads = {name: self._heads[name] for name in sorted(self._heads)}
        if not self._heads:
            raise ValueError(
                f"QKClip saw no attention in a training step of {type(pl_module).__name__}. It sees transformers'"
                " attention functions, scaled_dot_product_attention, softmax in modules named attention, and what calls"
                " `litropy.callbacks.attention_capture.report_attention` in its `forward`."
            )

    def _clip(self, pl_module: LightningModule) -> None:
        """Scale all heads by the largest logits of all ranks."""
        if not self._agreed:
            self._agree(pl_module)
        heads = {name: number for name, number in self._heads.items() if self._weights[name]}
        if heads and (self._steps_left or not self._on_alarm):
            nothing = torch.full((max(heads.values()),), -torch.inf, device=pl_module.device)
            largest = torch.cat([self._max_logits.get(name, nothing[:number]) for name, number in heads.items()])
            if _num_ranks() > 1:
                dist.all_reduce(largest, dist.ReduceOp.MAX)
            factors = clip_factors(largest, self.tau)
            for name, head_factors in zip(heads, factors.split(list(heads.values())), strict=True):
                for rows in self._weights[name]:
                    scale_rows(rows, head_factors)
            clipped = (factors < 1).sum().float()
            self._metrics = {"qk_clip/max_logit": largest.max(), "qk_clip/clipped_heads": clipped}
        self._max_logits = {}
        if self._on_alarm:
            self._steps_left = max(0, self._steps_left - 1)
            if not self._steps_left:
                self._unwatch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the largest logit, and how many heads were clipped."""
        if self._metrics:
            pl_module.log_dict(self._metrics)
            self._metrics = {}

    def _unwatch(self) -> None:
        self._open.close()
        self._watching = False

    def _close(self) -> None:
        self._unwatch()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore what was hooked."""
        self._close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore what was hooked."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """For how many steps the last alarm still holds."""
        return {"steps_left": self._steps_left}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._steps_left = state_dict["steps_left"]


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
