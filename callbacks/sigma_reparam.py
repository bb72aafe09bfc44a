"""Keep attention from collapsing: train weights whose spectral norm is a parameter of its own."""

import re
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from litropy.callbacks.sigma_reparam_weights import fold, reparametrize, spectral_gains

__all__ = ["SigmaReparam", "linear_weights"]

_MATRICES = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def linear_weights(
    module: nn.Module, layers: list[str] | None = None, exclude: list[str] | None = None
) -> dict[str, tuple[nn.Module, str]]:
    """Find the weight matrices of linear layers by the layers' names.

    Args:
        module: the model.
        layers: regular expressions, searched in names such as ``model.layers.0.mlp.up_proj``; None takes the layers of
            all repeated blocks, which leaves out embeddings and the output head.
        exclude: regular expressions of layers to leave out.

    Returns:
        The module that owns a weight, and the weight's name there, by the weight's full name. Frozen weights are left
        out, and so are those that an embedding shares.

    Raises:
        ValueError: if a pattern matches nothing, or nothing at all is found.

    Example::

        >>> model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2)]), "head": nn.Linear(2, 9)})
        >>> list(linear_weights(model))
        ['blocks.0.weight']
        >>> list(linear_weights(model, layers=["head"]))
        ['head.weight']
    """
    blocks = {id(part) for parent in module.modules() if isinstance(parent, nn.ModuleList) for part in parent.modules()}
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    unused = set(layers or ()) | set(exclude or ())
    found: dict[str, tuple[nn.Module, str]] = {}
    for name, part in module.named_modules():
        if not isinstance(part, nn.Linear | Conv1D | nn.MultiheadAttention):
            continue
        wanted = id(part) in blocks if layers is None else _matches(layers, name, unused)
        if _matches(exclude or [], name, unused) or not wanted:
            continue
        for attribute in _MATRICES:
            weight = None if is_parametrized(part, attribute) else getattr(part, attribute, None)
            if weight is not None and weight.requires_grad and id(weight) not in embeddings:
                found[f"{name}.{attribute}".lstrip(".")] = (part, attribute)
    if unused or not found:
        what = f"`{sorted(unused)[0]}` matches no linear layer" if unused else "found no trainable linear layer"
        names = [name for name, part in module.named_modules() if isinstance(part, nn.Linear | Conv1D)]
        there = ", ".join(names[:8]) or "none"
        raise ValueError(
            f"SigmaReparam: {what} in {type(module).__name__}; name some with `layers`. There are: {there}."
        )
    return found


def _matches(patterns: list[str], name: str, unused: set[str]) -> bool:
    matching = {pattern for pattern in patterns if re.search(pattern, name)}
    unused -= matching
    return bool(matching)


class SigmaReparam(Callback):
    r"""Train every linear layer of the blocks as :math:`\hat W = \frac{\gamma}{\sigma(W)} W` with a learnable gain.

    Spectral norms then grow only as fast as their gains learn, which keeps attention logits small and attention entropy
    high, at learning rates that collapse a plain model. The model computes the same as before at insertion
    (:math:`\gamma = \sigma(W)`), so pretrained weights are fine.

    The model changes before training, at ``configure_model``. The power iteration behind :math:`\sigma` advances once
    an optimiser step, whatever the accumulation, gradient checkpointing and the number of ranks. Vector and gain are in
    the model's state dict, so checkpoints of such a run go with this callback only; for export, ``fold`` or
    ``folded_state_dict`` give plain weights back.

    Not covered are weights of experts that are stored as one 3-D tensor. Weight decay on a reparametrised matrix does
    not change what it computes; gains are vectors, which usually do not decay.

    Args:
        layers: regular expressions of names of linear layers; None takes those of all repeated blocks, which leaves out
            embeddings and the output head.
        exclude: regular expressions of layers to leave out.

    Raises:
        ValueError: if no layer is found, the model is sharded already, or training has begun.

    Example::

        trainer = Trainer(callbacks=[SigmaReparam()])

    Reference: Zhai et al. 2023, "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", section
        3.2.
    """

    def __init__(self, layers: list[str] | None = None, exclude: list[str] | None = None) -> None:
        self.layers = layers
        self.exclude = exclude
        self._handles: list[RemovableHandle] = []

    def insert(self, module: nn.Module) -> None:
        """Reparametrise a model, unless it is already; a ``configure_model`` that shards calls this before it does.

        Raises:
            ValueError: as for the class.
        """
        if any(spectral_gains(module)):
            return
        weights = linear_weights(module, self.layers, self.exclude)
        reparametrize(weights)
        rank_zero_info(f"SigmaReparam: the spectral norms of {len(weights)} weights are parameters now.")

    @staticmethod
    def fold(module: nn.Module) -> None:
        """Make the weights of a model plain again, in place; it computes the same as before."""
        fold(module)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the model reparametrised as soon as it is built."""
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            name = type(trainer.strategy).__name__
            raise ValueError(f"SigmaReparam needs whole matrices, which {name} flattens; use ModelParallelStrategy.")
        configure_model = pl_module.configure_model

        def configure_and_insert() -> None:
            del pl_module.configure_model
            configure_model()
            self.insert(pl_module)

        # the last moment before optimisers are made, and after the module's own `setup`, which may build the model
        pl_module.configure_model = configure_and_insert  # type: ignore[method-assign]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Advance the power iteration after each optimiser step."""
        held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        weights = list(spectral_gains(pl_module))
        missing = [name for name, _, spectral in weights if id(spectral.gain) not in held]
        if missing:
            raise ValueError(
                f"The optimiser does not train the gain of `{missing[0]}`; take its parameters from the model in"
                " `configure_optimizers`."
            )
        self._remove_hooks()

        def advance(*arguments: Any) -> None:
            for _, holder, spectral in weights:
                spectral.advance(holder.original)

        self._handles = [optimizer.register_step_post_hook(advance) for optimizer in trainer.optimizers]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Refuse to begin in the middle of training."""
        if not self._handles:
            raise ValueError(
                "SigmaReparam changes the model, so it must be there before training begins; pass it to"
                " `Trainer(callbacks=[...])`."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimisers."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
