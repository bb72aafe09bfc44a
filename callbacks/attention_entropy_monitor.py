"""Measure the entropy of attention, layer by layer and head by head, while a model trains."""

import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from litropy.callbacks.attention_call import AttentionCall
from litropy.callbacks.attention_capture import attention_modules, capture_attention
from litropy.callbacks.attention_probe import AttentionProbe, Layers, ProbeResult
from litropy.callbacks.attention_records import draw_heatmap, save_arrays
from litropy.callbacks.attention_schedule import ProbeCost, ProbeSchedule
from litropy.callbacks.collapse_readings import Readings
from litropy.callbacks.logged_steps import is_logged_step
from litropy.callbacks.probe_clock import ProbeClock
from litropy.callbacks.step_begun import step_begun
from litropy.callbacks.uncompiled import is_compiled, uncompiled

__all__ = ["AttentionEntropyMonitor"]

# probes that may wait for a step at which Lightning waits for the device anyway
_MOST_WAITING = 64


class AttentionEntropyMonitor(Callback):
    r"""Measure how many keys the attention heads of a model look at.

    For row i of a head, with probabilities :math:`p_{ij}` over the :math:`n_i` keys that it may see, the entropy is
    :math:`H_i = -\sum_j p_{ij} \ln p_{ij} / \ln n_i`: 1 if the head looks at all keys alike, 0 if at one. A probe takes
    the queries and keys of every attention call of a training step. It logs, over sampled rows of all ranks,

    - ``entropy/attention/layer_3``, the mean of a layer, and ``entropy/attention/mean``, that of all layers;
    - ``entropy/attention_min/layer_3``, the mean of the head that has the least;
    - ``attention/max_logit/layer_3``, the largest logit: scaled, and before soft-capping;
    - ``attention/p_max/layer_3``, the mean of the rows' largest probabilities;
    - ``entropy/probe_ms``, what the latest probe took on this rank, and ``entropy/probe_share``, the share of all time
      that probes and their files have taken, from 0 to 1, counted anew when the dense steps are over.

    With a logger, arrays of all probes by layer and head go to ``attention_entropy/step_*.npz`` beside its files, and
    heat-maps to TensorBoard. A NaN or infinite logit makes its head and layer NaN, and is reported by name. Padding is
    left out; packed documents, sliding windows, soft-capping and sink logits count as the model has them.

    Works with models of transformers and with whatever calls ``scaled_dot_product_attention``,
    ``nn.MultiheadAttention`` or, in modules named attention, ``softmax``; what does none of these can call
    ``attention_capture.report_attention``. Nothing is hooked between probes. A probe changes no result, but runs
    compiled modules uncompiled, with other rounding and more memory. Of accumulated micro-batches it sees the first.
    Generation, evaluation and frozen reference models, which have no gradients, are not seen; what checkpointing
    recomputes counts once.

    The defaults are to keep probes under 1 % of the time from 100 million parameters up. With N parameters, L layers of
    width D, and R rows in S of B sequences, a probe's products are :math:`L D R S / (6 N B)` of a step's: 0.16 % at
    most for GPT-2 (124M), of which a probe has taken 5 % of a step on a CPU. On a GPU the host's time counts: 1 ms a
    layer, beside steps of 40 ms, would be 30 % of a step. If that step runs uncompiled and takes 50 % longer, both are
    0.8 steps in 100. A heat-map takes 0.15 s: 4 steps in 2000.

    Args:
        dense_steps: so many first steps of a run are all probed.
        every_n_steps: optimiser steps from one probe to the next after those.
        rows: query rows that are sampled from each sequence, spread at random.
        sequences: sequences that are sampled from a batch, on each rank.
        min_keys: rows that see fewer keys than this are left out, as :math:`\ln n` says little about them.
        heatmap_every_n_steps: least distance of heat-maps and of writing arrays, in optimiser steps; 0 for neither.

    Raises:
        ValueError: if a number is out of its range; when training starts, under tensor parallelism; at the first probe,
            if no attention is seen, with a list of what was found instead.

    Example::

        trainer = Trainer(callbacks=[AttentionEntropyMonitor(), CollapseDetector()])

    Reference: Zhai et al. 2023, "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", section 3.
    """

    def __init__(
        self,
        dense_steps: int = 200,
        every_n_steps: int = 100,
        rows: int = 128,
        sequences: int = 4,
        min_keys: int = 8,
        heatmap_every_n_steps: int = 2000,
    ) -> None:
        limits = {"dense_steps": 0, "every_n_steps": 1, "rows": 1, "sequences": 1, "min_keys": 1}
        given = {
            "dense_steps": dense_steps,
            "every_n_steps": every_n_steps,
            "rows": rows,
            "sequences": sequences,
            "min_keys": min_keys,
            "heatmap_every_n_steps": heatmap_every_n_steps,
        }
        for name, value in given.items():
            if value < (least := limits.get(name, 0)):
                raise ValueError(f"`{name}` is {value}; it must be at least {least}.")
        self.rows = rows
        self.sequences = sequences
        self.min_keys = min_keys
        self.heatmap_every_n_steps = heatmap_every_n_steps
        self.schedule = ProbeSchedule(dense_steps, every_n_steps)
        self.costs = {"dense": ProbeCost(), "sparse": ProbeCost()}
        self._last_heatmap: int | None = None
        self._open = ExitStack()
        self._probe: AttentionProbe | None = None
        self._forget()

    def _forget(self) -> None:
        self._layers: Layers | None = None
        self._latest: ProbeResult | None = None
        self._readings: Readings | None = None
        self._waiting: list[tuple[ProbeResult, ProbeClock, ProbeCost]] = []
        self._arrived: list[tuple[int, np.ndarray]] = []
        self._clock = ProbeClock(torch.device("cpu"))
        self._since: float | None = None
        self._folder: Path | None = None
        self._compiled = False
        self._warned: tuple[str, ...] = ()

    def collapse_readings(self) -> Readings | None:
        """Return the latest probe, for ``CollapseDetector``."""
        return self._readings

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit; see where arrays go, and whether anything is compiled."""
        self._forget()
        if not trainer.global_step:
            self.schedule.position, self._last_heatmap = 0, None
            self.costs = {phase: ProbeCost() for phase in self.costs}
        mesh = pl_module.device_mesh
        if mesh is not None and "tensor_parallel" in (mesh.mesh_dim_names or ()) and mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                f"The strategy has tensor_parallel_size={mesh['tensor_parallel'].size()}, which gives each rank other"
                " heads; AttentionEntropyMonitor adds up the same heads of all ranks. Leave the monitor out, or set"
                " tensor_parallel_size to 1."
            )
        self._compiled = is_compiled(pl_module.modules())
        folder = trainer.log_dir if trainer.loggers and self.heatmap_every_n_steps else None
        self._folder = Path(folder) / "attention_entropy" if folder is not None else None

    # a probe

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch attention if an optimiser step begins that is probed."""
        self._close()  # still open if the batch before was left out
        if batch_idx % trainer.accumulate_grad_batches or not self.schedule.begin_step():
            return
        seed = self.schedule.position
        self._probe = AttentionProbe(trainer.global_step, seed, self.rows, self.sequences, self.min_keys)
        self._clock = ProbeClock(pl_module.device)
        if self._compiled:
            self._open.enter_context(uncompiled())
        begun = step_begun(trainer)

        def see(call: AttentionCall) -> None:
            # a module may try its model out on the batch before its step
            if self._probe is not None and begun():
                with self._clock.running():
                    self._probe.add(call)

        self._open.enter_context(capture_attention(pl_module, see, recomputations=True))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop watching, publish what was seen, and log."""
        probe, logged = self._close(), is_logged_step(trainer)
        if probe is not None:
            with self._clock.running():
                self._publish(probe, pl_module)
        self._count_time()
        # on a CPU nothing has to be waited for
        if logged or len(self._waiting) >= _MOST_WAITING or self._is_heatmap_due or pl_module.device.type == "cpu":
            self._fetch()
        if self._latest is not None and (probe is not None or logged):
            pl_module.log_dict(self._latest.metrics())
            numbers = {"entropy/probe_ms": self._cost.last_ms, "entropy/probe_share": self._cost.share}
            if self._cost.last_ms:
                # from the host to a device would wait for it
                pl_module.log_dict({name: torch.tensor(x) for name, x in numbers.items()}, rank_zero_only=True)
        if self._is_heatmap_due:
            self._write(trainer, heatmap=True)

    def _close(self) -> AttentionProbe | None:
        """End a probe, if there is one."""
        self._open.close()
        probe, self._probe = self._probe, None
        return probe

    def _publish(self, probe: AttentionProbe, pl_module: LightningModule) -> None:
        if self._layers is None:
            layers = probe.layers()
            if not layers.paths:
                raise ValueError(_nothing_seen(pl_module))
            self._layers = layers
            self._warn_of_unseen(attention_modules(pl_module), layers)
        elif unknown := probe.unknown(self._layers):
            self._warn(f"not among the layers of the first probe, and left out: {', '.join(unknown)}")
        self._latest = probe.finish(self._layers, pl_module.device)
        self._readings = self._latest.readings()
        self._waiting.append((self._latest, self._clock, self._cost))

    # what is reported

    def _warn_of_unseen(self, candidates: dict[str, str], layers: Layers) -> None:
        def related(path: str) -> bool:
            return any(f"{seen}.".startswith(f"{path}.") or path.startswith(f"{seen}.") for seen in layers.paths)

        unseen = [f"{path} ({kind})" for path, kind in candidates.items() if not related(path)]
        if unseen:
            self._warn(f"not called with gradients in the first step, and left out: {_some(unseen)}")

    def _warn(self, message: str) -> None:
        rank_zero_warn(f"AttentionEntropyMonitor: {message}.")

    def _fetch(self) -> None:
        """Bring the probes that wait to the host, in one copy, and look for what is not finite."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        values = torch.stack([result.values for result, _, _ in waiting]).cpu().numpy()
        for (result, clock, cost), numbers in zip(waiting, values, strict=True):
            cost.add_probe(clock.take() or 0.0)
            if self._folder is not None:
                self._arrived.append((result.step, numbers))
            rows, broken = numbers[3:].sum(-1)
            some = [index for index, count in enumerate(broken) if count]
            names = tuple(result.layers.names[index] for index in some)
            if some and names != self._warned:
                shares = [f"{result.layers.names[i]} ({broken[i]:.0f} of {rows[i]:.0f} rows)" for i in some]
                self._warn(f"NaN or infinity in queries or keys at step {result.step}: {_some(shares)}")
            self._warned = names

    @property
    def _is_heatmap_due(self) -> bool:
        if self._folder is None or self._latest is None:
            return False
        return self._last_heatmap is None or self._latest.step - self._last_heatmap >= self.heatmap_every_n_steps

    def _write(self, trainer: Trainer, heatmap: bool) -> None:
        """Write what has been fetched: arrays to disk, and a heat-map of the latest probe."""
        arrived, self._arrived = self._arrived, []
        if not arrived or self._layers is None or self._folder is None:
            return
        begin = time.perf_counter()
        steps, numbers = zip(*arrived, strict=True)
        if heatmap:
            self._last_heatmap = steps[-1]
        if not trainer.is_global_zero:
            return
        names = self._layers.names
        save_arrays(self._folder, steps, names, np.stack(numbers))
        for logger in trainer.loggers if heatmap else ():
            if isinstance(logger, TensorBoardLogger):
                image = draw_heatmap(steps[-1], names, *numbers[-1][:2])
                logger.experiment.add_image("attention/entropy", image, steps[-1], dataformats="HWC")
        self._cost.probe_ms += (time.perf_counter() - begin) * 1e3

    # time

    @property
    def _cost(self) -> ProbeCost:
        return self.costs["dense" if self.schedule.is_dense else "sparse"]

    def _count_time(self) -> None:
        now = time.perf_counter()
        if self._since is not None:
            self._cost.step_ms += (now - self._since) * 1e3
        self._since = now

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count no time between epochs."""
        self._since = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count no time of validation."""
        self._since = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count time again."""
        self._since = time.perf_counter() if trainer.training else None

    # the end, and checkpoints

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore what was hooked."""
        self._close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is left."""
        self._close()
        self._fetch()
        self._write(trainer, heatmap=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write what a run that continues from here would not have."""
        self._fetch()
        self._write(trainer, heatmap=False)

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is, what probes have cost, and when the last heat-map was drawn."""
        costs = {phase: asdict(cost) for phase, cost in self.costs.items()}
        return {"position": self.schedule.position, "costs": costs, "last_heatmap": self._last_heatmap}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.schedule.position = state_dict["position"]
        self.costs = {phase: ProbeCost(**cost) for phase, cost in state_dict["costs"].items()}
        self._last_heatmap = state_dict["last_heatmap"]


def _some(items: list[str], most: int = 8) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def _nothing_seen(model: torch.nn.Module) -> str:
    candidates = [f"{path} ({kind})" for path, kind in attention_modules(model).items()]
    found = _some(candidates) if candidates else "none"
    kinds = sorted({type(module).__name__ for module in model.modules()})
    return (
        f"AttentionEntropyMonitor saw no attention in a training step of {type(model).__name__}. Modules named"
        f" attention: {found}; all kinds of modules: {_some(kinds, 20)}. It sees transformers' attention functions,"
        " scaled_dot_product_attention, and softmax in modules named attention, where gradients are enabled. In a"
        " module with a kernel of its own, call `litropy.callbacks.attention_capture.report_attention(self, q, k,"
        " scale=..., causal=...)` in `forward`; a model without attention needs no AttentionEntropyMonitor."
    )
