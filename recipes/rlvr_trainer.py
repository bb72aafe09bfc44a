"""What RLVR asks of its options and of Lightning's trainer, and how it goes around the latter's gradient averages."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.nn.parallel import DistributedDataParallel

from litropy.recipes.causal_lm import CausalLM
from litropy.recipes.sharding import decoder_layers
from litropy.recipes.steering.guard import explain
from litropy.recipes.steering.objective import Methods
from litropy.recipes.steering.sampler import Sampler

__all__ = ["check_options", "check_trainer", "recomputing", "without_sync"]

_PRECISIONS = ("32-true", "64-true", "bf16-true", "bf16-mixed")


def check_options(
    methods: Methods,
    sampler: Sampler,
    reference: str,
    group_size: int,
    mini_batch_size: int | None,
    micro_batch_size: int,
    epochs: int,
    max_new_tokens: int,
) -> None:
    """Warn about methods that do nothing together.

    Raises:
        ValueError: if an option is out of its range, or a method misses what it needs.
    """
    if reference not in ("none", "frozen", "adapter_off"):
        raise ValueError(f"`reference` is {reference!r}; choose 'none', 'frozen' or 'adapter_off'.")
    for name, value in (
        ("mini_batch_size", 1 if mini_batch_size is None else mini_batch_size),
        ("micro_batch_size", micro_batch_size),
        ("epochs", epochs),
        ("max_new_tokens", max_new_tokens),
    ):
        if value < 1:
            raise ValueError(f"`{name}` is {value}; it must be at least 1.")
    least = methods.advantage.min_group_size
    if group_size < least:
        raise ValueError(
            f"`group_size` is {group_size}, but {type(methods.advantage).__name__} compares responses to the same"
            f" prompt with one another; it needs at least {least}."
        )
    for penalty in methods.penalties:
        if penalty.needs_reference and reference == "none":
            raise ValueError(
                f"{type(penalty).__name__} needs a reference model; set `reference` to 'frozen' or, with `lora`, to"
                " 'adapter_off'."
            )
    for sentence in explain(methods, sampler, one_update=mini_batch_size is None and epochs == 1):
        rank_zero_warn(sentence)


def check_trainer(trainer: Trainer) -> None:
    """Raise ValueError if the trainer's strategy or precision would make the update wrong."""
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise ValueError(f"RLVR trains on one device or with DDPStrategy, not with {type(strategy).__name__}.")
    if trainer.precision not in _PRECISIONS:
        raise ValueError(
            f"precision is {trainer.precision!r}; half-precision ratios and scaled losses would bias the update."
            f" Choose one of {', '.join(_PRECISIONS)}."
        )


def without_sync(model: Any) -> AbstractContextManager[None]:
    """Keep DDP from averaging gradients in each backward pass: ranks may have different numbers of them."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


@contextmanager
def recomputing(policy: CausalLM, enabled: bool) -> Iterator[None]:
    """Let decoder layers recompute their activations, which they do in training mode only; dropout stays off."""
    layers = decoder_layers(policy.backbone) if enabled else []
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
