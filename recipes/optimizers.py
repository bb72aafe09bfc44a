"""AdamW with decay groups, and learning-rate schedules as pure functions of the step."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW

__all__ = ["Schedule", "adamw", "decay_groups", "learning_rate_factor"]

Schedule = Literal["cosine", "wsd", "constant"]


def learning_rate_factor(
    schedule: Schedule,
    total_steps: float,
    warmup_steps: int = 0,
    min_ratio: float = 0.0,
    decay_share: float = 0.2,
) -> Callable[[int], float]:
    r"""Factor of the learning rate as a function of the number of optimiser steps taken so far.

    All schedules rise linearly, step ``s`` having :math:`(s + 1) / w` of the rate, for ``warmup_steps`` :math:`w`.
    Then, with :math:`x` the share of the decay that is over and :math:`m` the ``min_ratio``::

        cosine      m + (1 - m) (1 + cos(pi x)) / 2    from the end of the warm-up to the last step
        wsd         1, then 1 - (1 - m) sqrt(x)        over the last decay_share of all steps
        constant    1

    Args:
        schedule: ``"cosine"``, ``"wsd"`` (warm-up, stable, decay) or ``"constant"``.
        total_steps: optimiser steps of the whole run; only ``"constant"`` accepts infinity.
        warmup_steps: steps of the linear rise.
        min_ratio: share of the learning rate that is left at the end, from 0 to 1.
        decay_share: share of all steps during which ``"wsd"`` decays, from 0 to 1.

    Returns:
        A function from the step (0 before the first) to the factor.

    Raises:
        ValueError: if an option is out of its range, or the number of steps is unknown and the schedule needs it.

    Example::

        >>> factor = learning_rate_factor("cosine", total_steps=10, warmup_steps=2, min_ratio=0.1)
        >>> [round(factor(step), 3) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.55, 0.1]

    Reference:
        Loshchilov and Hutter 2017 (cosine); Hu et al. 2024, MiniCPM, and Haegele et al. 2024, equation 1 (WSD with a
        square-root decay).
    """
    if schedule not in ("cosine", "wsd", "constant"):
        raise ValueError(f"`schedule` is {schedule!r}; choose 'cosine', 'wsd' or 'constant'.")
    if schedule != "constant" and not math.isfinite(total_steps):
        raise ValueError(
            f"schedule {schedule!r} needs to know when training ends; set trainer.max_steps, or choose schedule"
            f" 'constant'."
        )
    if warmup_steps < 0:
        raise ValueError(f"`warmup_steps` is {warmup_steps}; it must be at least 0.")
    if not 0 <= min_ratio <= 1 or not 0 <= decay_share <= 1:
        raise ValueError(f"`min_ratio` ({min_ratio}) and `decay_share` ({decay_share}) must be from 0 to 1.")
    begin = warmup_steps if schedule == "cosine" else max(warmup_steps, total_steps * (1 - decay_share))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if schedule == "constant" or step < begin:
            return 1.0
        done = min(1.0, (step - begin) / max(1, total_steps - begin))
        if schedule == "cosine":
            return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * done)) / 2
        return 1 - (1 - min_ratio) * math.sqrt(done)

    return factor


def decay_groups(
    modules: Iterable[nn.Module], weight_decay: float, decay_embeddings: bool = True
) -> list[dict[str, Any]]:
    """Split trainable parameters into those with weight decay (matrices) and those without (biases, norms).

    Args:
        modules: whose parameters to take; each module's submodules are visited as well.
        weight_decay: decay of the first group.
        decay_embeddings: whether ``nn.Embedding`` weights decay; a head tied to one follows it.

    Returns:
        One or two groups as ``torch.optim`` takes them, without empty ones.
    """
    embeddings: set[int] = set()
    parameters: dict[int, nn.Parameter] = {}
    for module in modules:
        for submodule in module.modules():
            own = [parameter for parameter in submodule.parameters(recurse=False) if parameter.requires_grad]
            parameters.update((id(parameter), parameter) for parameter in own)
            if isinstance(submodule, nn.Embedding):
                embeddings.update(map(id, own))

    def decays(parameter: nn.Parameter) -> bool:
        return parameter.ndim > 1 and (decay_embeddings or id(parameter) not in embeddings)

    groups = [
        {"params": [p for p in parameters.values() if decays(p)], "weight_decay": weight_decay},
        {"params": [p for p in parameters.values() if not decays(p)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(
    groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float], eps: float, fused: bool = True
) -> AdamW:
    """AdamW, fused into one kernel a step where the device allows it.

    Args:
        groups: parameter groups, each with its weight decay.
        learning_rate: peak learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        fused: False for the unfused update, which a gradient scaler with clipping needs.

    Raises:
        ValueError: if nothing is trainable.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    if not parameters:
        raise ValueError("No parameter of the model requires a gradient; there is nothing to train.")
    fused = fused and all(p.device.type in ("cpu", "cuda") and torch.is_floating_point(p) for p in parameters)
    return AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused)
