"""Notice when all tokens become the same vector, which attention and loss do not show."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from litropy.callbacks.collapse_readings import Readings
from litropy.callbacks.representation_layers import find_layers, hidden_states, layer_suffix
from litropy.callbacks.representation_metrics import (
    RowSums,
    effective_rank,
    matrix_entropy,
    mean_cosine,
    participation_ratio,
    projection,
    row_sums,
)
from litropy.callbacks.step_begun import step_begun
from litropy.callbacks.uncompiled import is_compiled, uncompiled

__all__ = ["RepresentationCollapseMonitor"]


class RepresentationCollapseMonitor(Callback):
    r"""Measure how many directions the outputs of a model's layers use.

    At a probe, about ``rows`` random tokens of a step (of all ranks and micro-batches together, padding left out) are
    scaled to length 1. With :math:`\lambda` the eigenvalues of their mean outer product, for each layer it logs

    - ``representation/effective_rank/layer_3``, :math:`\exp(-\sum p \ln p)` with :math:`p \propto \sqrt\lambda`: 1 when
      all tokens are the same up to length, D when they point everywhere alike;
    - ``representation/participation_ratio/layer_3``, :math:`1 / \sum \lambda^2`: the same range, ruled by the strongest
      directions;
    - ``representation/matrix_entropy/layer_3``, :math:`-\sum \lambda \ln \lambda / \ln \min(N, D)`: from 0 to 1;
    - ``representation/mean_cosine/layer_3``, between two tokens: 1 when all are the same.

    None of them sees the length of vectors, or whether directions mean anything; healthy runs have a cosine near 1 in
    their first steps. Ranks grow with the number of rows, and with more than ``width`` features the first three are
    those of a random projection to ``width``, which is also the most that they can be: compare runs of equal settings.

    A layer counts once in a batch, whatever gradient checkpointing recomputes. Layers are hooked at probes only, and
    compiled code runs uncompiled there. The eigenvalues wait for the device, once a probe.

    Args:
        layers: regular expression for the names of the modules whose outputs to measure; None takes the decoder layers.
        every_n_steps: optimiser steps from one probe to the next.
        rows: tokens that a probe samples.
        width: features above which rows are projected.

    Raises:
        ValueError: if a number is under 1, or when training starts and there are no such layers.

    Example::

        trainer = Trainer(callbacks=[RepresentationCollapseMonitor(), CollapseDetector()])

    Reference: Roy and Vetterli, EUSIPCO 2007; Garrido et al., arXiv 2210.02885; Wei et al., arXiv 2401.17139.
    """

    def __init__(self, layers: str | None = None, every_n_steps: int = 10, rows: int = 1024, width: int = 128) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("rows", rows), ("width", width)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1.")
        self.layers = layers
        self.every_n_steps = every_n_steps
        self.rows = rows
        self.width = width
        self._found: dict[int | str, nn.Module] = {}
        self._sums: dict[int | str, RowSums] = {}
        self._batch: dict[int | str, tuple[bool, RowSums]] = {}
        self._chosen: dict[torch.Size, tuple[Tensor, Tensor | None]] = {}
        self._directions: dict[int, Tensor] = {}
        self._mask: Tensor | None = None
        self._probed_step = -1
        self._generator: torch.Generator | None = None
        self._rows_now = 0
        self._compiled = False
        self._hooks = ExitStack()
        self._readings: Readings | None = None

    def collapse_readings(self) -> Readings | None:
        """Return the latest probe, for ``CollapseDetector``."""
        return self._readings

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers."""
        self._found = find_layers(pl_module, self.layers)
        # compiled code does not call hooks that came after it
        self._compiled = is_compiled(pl_module.modules())
        self._sums, self._directions, self._readings, self._probed_step = {}, {}, None, -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Hook the layers if this step is probed."""
        step = trainer.global_step
        if step % self.every_n_steps:
            return
        if step != self._probed_step:
            self._probed_step, self._sums = step, {}
        self._batch, self._chosen = {}, {}
        mask = batch.get("attention_mask") if hasattr(batch, "get") else None
        self._mask = mask if isinstance(mask, Tensor) else None
        # a number of its own for each micro-batch and rank; the global random state stays as it is
        self._generator = torch.Generator(pl_module.device).manual_seed(
            (step * 1009 + batch_idx) * trainer.world_size + trainer.global_rank
        )
        self._rows_now = -(-self.rows // (trainer.world_size * trainer.accumulate_grad_batches))
        if self._compiled:
            self._hooks.enter_context(uncompiled())
        begun = step_begun(trainer)
        for layer, module in self._found.items():
            handle = module.register_forward_hook(partial(self._observe, begun, layer))
            self._hooks.callback(handle.remove)

    def _observe(self, begun: Callable[[], bool], layer: int | str, module: nn.Module, args: Any, output: Any) -> None:
        """Measure a layer's first call with gradients in the training step, else its first call.

        What gradient checkpointing recomputes in the backward pass is either a later call or gives the same numbers.
        """
        learns, earlier = torch.is_grad_enabled(), self._batch.get(layer)
        # the module may also run its layers before its step, as for a check of the first batch
        outside = earlier is None and not begun()
        if outside or (earlier is not None and (earlier[0] or not learns)):
            return
        with torch.no_grad():
            hidden = hidden_states(output, layer).detach()
            index, weight = self._choose(hidden)
            self._batch[layer] = learns, row_sums(hidden.flatten(0, -2)[index], weight, self._project(hidden))

    def _choose(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Random tokens, the same in all layers of a batch, and which of them are no padding."""
        shape = hidden.shape[:-1]
        if shape not in self._chosen:
            order = torch.rand(shape.numel(), generator=self._generator, device=hidden.device)
            real = None
            if self._mask is not None and self._mask.shape == shape:
                real = (self._mask != 0).flatten().to(hidden.device)
                order = order + real
            index = order.topk(min(self._rows_now, shape.numel())).indices
            self._chosen[shape] = index, None if real is None else real[index]
        return self._chosen[shape]

    def _project(self, hidden: Tensor) -> Tensor | None:
        width = hidden.shape[-1]
        if width <= self.width:
            return None
        if width not in self._directions:
            self._directions[width] = projection(width, self.width, hidden.device)
        return self._directions[width]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the hooks away; when the optimiser step is complete, log what they saw."""
        self._hooks.close()
        for layer, (_, sums) in self._batch.items():
            self._sums[layer] = self._sums[layer] + sums if layer in self._sums else sums
        self._batch = {}
        if not self._sums or trainer.global_step == self._probed_step:
            return
        sums, most = self._gather()
        self._sums, self._chosen, self._mask = {}, {}, None
        spectrum = sums.spectrum
        values = {
            "representation/effective_rank": effective_rank(spectrum),
            "representation/participation_ratio": participation_ratio(spectrum),
            "representation/matrix_entropy": matrix_entropy(spectrum, torch.minimum(sums.count, most)),
            "representation/mean_cosine": mean_cosine(sums),
        }
        values = {name: value.float() for name, value in values.items()}
        self._readings = Readings(self._probed_step, values, tuple(self._found))
        for name, value in values.items():
            for layer, number in zip(self._found, value.unbind(), strict=True):
                pl_module.log(f"{name}/{layer_suffix(layer)}", number)

    def _gather(self) -> tuple[RowSums, Tensor]:
        """The sums of all layers, stacked, over all ranks, and how many directions each layer has.

        Narrow layers are padded with zeros, which add nothing to any metric.
        """
        some = next(iter(self._sums.values()))
        width = max(sums.total.shape[-1] for sums in self._sums.values())
        side = max(sums.moment.shape[-1] for sums in self._sums.values())
        count = some.count.new_zeros(len(self._found))
        total, moment = count.new_zeros(len(count), width), count.new_zeros(len(count), side, side)
        most = count.new_full((len(count),), side)
        for row, layer in enumerate(self._found):
            if layer in self._sums:
                sums = self._sums[layer]
                size = sums.moment.shape[-1]
                count[row], most[row] = sums.count, size
                total[row, : sums.total.shape[-1]], moment[row, :size, :size] = sums.total, sums.moment
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for tensor in (count, total, moment):
                dist.all_reduce(tensor)
        return RowSums(count, total, moment), most

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks away."""
        self._hooks.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the layers."""
        self._hooks.close()
        self._found = {}
