"""Hold attention entropy in a band by a penalty whose gradient enters where attention is computed."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from litropy.callbacks.attention_call import AttentionCall
from litropy.callbacks.attention_capture import AttentionCapture, capture_attention
from litropy.callbacks.attention_schedule import sample_rows
from litropy.callbacks.collapse_alarm import Alarm
from litropy.callbacks.entropy_regularizer_penalties import BandOfMeans, BandOfRows, EntropyPenalty, RowEntropies

__all__ = ["AttentionEntropyRegularizer"]

# rows that see fewer say little
_LEAST_KEYS = 8


class AttentionEntropyRegularizer(Callback):
    r"""Penalise heads whose attention entropy leaves a band around a learned threshold, or falls under a floor.

    The loss becomes :math:`L + \lambda\,\mathrm{mean}_h (|H_h - \theta_h| - m)_+^2 + \mu \sum_h (f - H_h)_+^2`, where
    :math:`H_h` is the mean over rows of the entropy of head h over :math:`\ln n`, n the keys that a row sees: 1 if it
    looks at all alike. Thresholds :math:`\theta`, one a layer and head, follow the penalty's gradient at a rate of
    their own; they belong to this callback and not to the model.

    Works on any module with automatic optimisation, and never stores attention: the gradient enters at queries and
    keys, of sampled rows. How strongly a head is pulled is decided by its mean entropy in the whole optimiser step
    before, of all ranks, so it depends neither on micro-batches nor on ranks; the loss that is logged stays the task's.
    Rows that see fewer than 8 keys, and padding, do not count. Logs ``entropy_regularizer/penalty``, which the step's
    entropies have.

    As one of a ``CollapseDetector``'s actions it begins with the first alarm.

    Args:
        weight: weight of the band, a mean over heads.
        margin: half width of the band, as a share of the largest entropy.
        threshold: where thresholds begin, from 0 to 1.
        threshold_rate: share of what lies outside of the band by which thresholds follow in a step.
        floor: normalised entropy below which the second term acts; 0 for none.
        floor_weight: weight of the floor, a sum over heads.
        rows: query rows of each sequence that are sampled; None takes all.
        released: the penalty of the authors' code: thresholds that all layers share, :math:`\delta^2` outside of the
            band and 0 inside, entropies over :math:`\ln T` of the longest row, each row for itself, summed over batch
            and rows, no floor; the weight there is 1e-5.
        level: lowest level of alarms that begins it: 1 or 2.

    Raises:
        ValueError: if a number is out of its range; in training, if optimisation is manual, or no queries and keys are
            seen.

    Example::

        trainer = Trainer(callbacks=[AttentionEntropyRegularizer(floor=0.3)])

    Reference: Jha and Reagen 2025, "Entropy-Guided Attention for Private LLMs", section 4.
    """

    def __init__(
        self,
        weight: float = 1.0,
        margin: float = 0.2,
        threshold: float = 0.5,
        threshold_rate: float = 0.01,
        floor: float = 0.3,
        floor_weight: float = 1.0,
        rows: int | None = 128,
        released: bool = False,
        level: Literal[1, 2] = 2,
    ) -> None:
        for name, value in (("weight", weight), ("floor_weight", floor_weight)):
            if not value >= 0:
                raise ValueError(f"`{name}` is {value}; it must be at least 0.")
        shares = {"margin": margin, "threshold": threshold, "threshold_rate": threshold_rate, "floor": floor}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"`{name}` is {share}; it is a share, from 0 to 1.")
        if rows is not None and rows < 1:
            raise ValueError(f"`rows` is {rows}; it must be at least 1, or None for all.")
        self.penalty: EntropyPenalty = (
            BandOfRows(weight, margin, threshold, threshold_rate)
            if released
            else BandOfMeans(weight, margin, floor, floor_weight, threshold, threshold_rate)
        )
        self.rows = rows
        self.level = level
        self._active = True
        self._capture: AttentionCapture | None = None
        self._undo: list[Callable[[], Any]] = []
        self._forget_step()

    def _forget_step(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._metrics: dict[str, Tensor] = {}
        self._terms: list[Tensor] | None = None
        self._seen: set[str] = set()
        self._seed = 0

    def act(self, alarm: Alarm, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the next batch."""
        self._active = self._active or alarm.level >= self.level

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See whether this waits for an alarm."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._active = not any(self in getattr(callback, "actions", ()) for callback in callbacks)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the penalty's gradient added to that of the loss."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                "AttentionEntropyRegularizer adds to the loss that `training_step` returns, but"
                f" {type(pl_module).__name__} optimises manually; set `automatic_optimization` to True."
            )
        mesh = pl_module.device_mesh
        if mesh is not None and "tensor_parallel" in (mesh.mesh_dim_names or ()) and mesh["tensor_parallel"].size() > 1:
            raise ValueError("AttentionEntropyRegularizer needs all heads on each rank; set tensor_parallel_size to 1.")
        self._close()
        self._forget_step()
        training_step = pl_module.training_step

        def training_step_and_penalty(*args: Any, **kwargs: Any) -> Any:
            self._terms = []
            output = training_step(*args, **kwargs)
            terms, self._terms = self._terms, None
            return _add_gradient(output, torch.stack(terms).sum()) if terms else output

        def after_step(*arguments: Any) -> None:
            if self._capture is not None:
                self._end_step(pl_module)

        pl_module.training_step = training_step_and_penalty  # type: ignore[method-assign]
        self._undo = [lambda: pl_module.__dict__.pop("training_step")]
        handles: list[RemovableHandle] = [o.register_step_post_hook(after_step) for o in trainer.optimizers]
        self._undo += [handle.remove for handle in handles]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch attention."""
        self._seen, self._seed = set(), trainer.global_step
        if self._active and self._capture is None:
            self._capture = capture_attention(pl_module, self._see, recomputations=True)

    def _see(self, call: AttentionCall) -> None:
        """Take a call of a training step, or what checkpointing repeats of it: the same operations, for nothing."""
        if call.recomputed and call.name in self._seen:
            self._term(call)
        elif not call.recomputed and self._terms is not None:
            self._seen.add(call.name)
            term, sums = self._term(call)
            if term is not None:
                self._terms.append(term)
            self._sums[call.name] = self._sums.get(call.name, 0) + sums

    def _term(self, call: AttentionCall) -> tuple[Tensor | None, Tensor]:
        if call.source == "softmax":
            raise ValueError(
                f"AttentionEntropyRegularizer needs the queries and keys of {call.name}, which stores its logits;"
                ' choose attn_implementation="sdpa", or call `attention_capture.report_attention` in its `forward`.'
            )
        Tq, Tk = call.q.shape[2], call.k.shape[2]
        begins = self.penalty.begins(call.name)
        index = sample_rows(Tq, self.rows or Tq, self._seed).to(call.q.device, non_blocking=True)
        with torch.set_grad_enabled(begins):
            stats = call.stats(index)
            least = min(_LEAST_KEYS, Tk, call.window or _LEAST_KEYS)
            counted = (stats.visible_keys >= least) & stats.entropy.isfinite()
            if (padding := call.padding(index)) is not None:
                counted &= ~padding[:, None]
            rows = RowEntropies(stats.entropy, stats.normalized_entropy, counted, Tk, Tq)
            return self.penalty.term(call.name, rows) if begins else None, self.penalty.sums(call.name, rows)

    def _end_step(self, pl_module: LightningModule) -> None:
        """Settle the penalty of the next step by the sums of all micro-batches and ranks."""
        if not self._sums:
            raise ValueError(
                "AttentionEntropyRegularizer saw no queries and keys with gradients in a step of"
                f" {type(pl_module).__name__}. Reentrant checkpointing hides them: use_reentrant=False. A module with a"
                " kernel of its own calls `litropy.callbacks.attention_capture.report_attention` in its `forward`."
            )
        names = sorted(self._sums)
        sums = torch.cat([self._sums[name] for name in names], 1)
        heads = [self._sums[name].shape[1] for name in names]
        self._sums = {}
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        penalty = self.penalty.end_step(dict(zip(names, sums.split(heads, 1), strict=True)))
        self._metrics = {"entropy_regularizer/penalty": penalty}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the penalty of an optimiser step."""
        if self._metrics:
            pl_module.log_dict(self._metrics)
            self._metrics = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore what was hooked."""
        self._close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore what was hooked."""
        self._close()

    def _close(self) -> None:
        if self._capture is not None:
            self._capture.close()
        for undo in self._undo:
            undo()
        self._capture, self._undo = None, []

    def state_dict(self) -> dict[str, Any]:
        """Whether it has begun, thresholds, and what the next step needs."""
        return {"active": self._active, "penalty": self.penalty.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._active = state_dict["active"]
        self.penalty.load_state_dict(state_dict["penalty"])


def _add_gradient(output: Any, penalty: Tensor) -> Any:
    """Add the gradient of a penalty to a loss, or to the one in a dictionary, without changing the loss's value."""
    if output is None:
        return None
    if isinstance(output, Mapping):
        return {**output, "loss": _add_gradient(output["loss"], penalty)}
    return output + (penalty - penalty.detach()).to(output.dtype)
