"""Reads the logits that a model with a loss of its own computes, and what each position had to predict.

Nothing is computed again: a hook on the output head sees that logits come, and the module around it that returns them
has the final ones, with whatever softcap, scale, adapter or cut the model applies.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from litropy.callbacks.logit_transforms import logit_transforms

__all__ = ["HeadPlace", "LogitTap", "find_heads", "next_tokens"]

# logits, and the token after each position, -100 where none counts, or None if that is unknown
Observe = Callable[[Tensor, Tensor | None], None]


class HeadPlace(NamedTuple):
    """An output head inside a model.

    Attributes:
        head: the module that gives raw logits.
        around: the modules that contain it, the innermost first.
        model: the Hugging Face model that it belongs to, or None.
    """

    head: nn.Module
    around: tuple[nn.Module, ...]
    model: Any


def find_heads(root: nn.Module, name: str | None = None) -> list[HeadPlace]:
    """Find the output heads of the causal language models in a module.

    Args:
        root: any module; the heads of all Hugging Face models in it that generate text one token after another.
        name: dotted name of the one module that gives logits, for other models.

    Raises:
        ValueError: if there is no module of that name.

    Example::

        >>> from litropy.testing import tiny_causal_lm
        >>> model = nn.ModuleDict({"policy": tiny_causal_lm("llama")})
        >>> [type(module).__name__ for module in find_heads(model)[0].around]
        ['LlamaForCausalLM']
    """
    modules = dict(root.named_modules())
    if name is not None:
        if name not in modules:
            linear = {path: module.out_features for path, module in modules.items() if isinstance(module, nn.Linear)}
            widest = sorted(linear, key=lambda path: -linear[path])[:3]
            raise ValueError(
                f"`head` is {name!r}, but {type(root).__name__} has no module of that name; it must be the one that"
                f" gives logits, such as {', '.join(map(repr, widest)) or 'a linear layer'}."
            )
        return [HeadPlace(modules[name], _around(modules, name), None)]
    names = {id(module): path for path, module in modules.items()}
    found = {}
    for module in modules.values():
        head = _head_of(module)
        if head is not None and id(head) in names:
            found[id(head)] = HeadPlace(head, _around(modules, names[id(head)]), module)
    return list(found.values())


def _head_of(module: Any) -> nn.Module | None:
    if not callable(getattr(module, "get_output_embeddings", None)) or not hasattr(module, "can_generate"):
        return None
    if getattr(module.config, "is_encoder_decoder", False) or not module.can_generate():
        return None
    return module.get_output_embeddings()


def _around(modules: Mapping[str, nn.Module], name: str) -> tuple[nn.Module, ...]:
    """The root is left out: what a training step returns are no logits."""
    parts = name.split(".")
    return tuple(modules[".".join(parts[:end])] for end in range(len(parts) - 1, 0, -1))


class LogitTap:
    """Observes the final logits of one head while installed, if gradients will flow back through them.

    Args:
        place: where the head is.
        observe: called with them, [..., V], and the token after each position.
    """

    def __init__(self, place: HeadPlace, observe: Observe) -> None:
        self.place = place
        self.observe = observe
        self._raw: list[Tensor] = []

    @contextmanager
    def installed(self, is_open: Callable[[], bool]) -> Iterator[None]:
        """Hook the modules; ``is_open`` says whether a call of the head counts."""

        def keep(head: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # a head that a loss without logits has tapped gives no rows
            if isinstance(output, Tensor) and output.requires_grad and output.numel() and is_open():
                self._raw.append(output)

        with ExitStack() as stack:
            stack.callback(self._raw.clear)
            stack.callback(self.place.head.register_forward_hook(keep).remove)
            for module in self.place.around:
                stack.callback(module.register_forward_hook(self._returned, with_kwargs=True).remove)
            yield

    def _returned(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._raw:
            return
        logits = _logits_in(output, self._raw[-1])
        if logits is not None:
            self._raw.clear()
            self.observe(logits.detach(), next_tokens(_given(module, args, kwargs), logits.shape[:-1]))

    def flush(self) -> None:
        """Observe logits that no module around the head has returned: the training step called the head itself.

        Raises:
            ValueError: if the model's config says that they are not final.
        """
        raw, self._raw[:] = list(self._raw), []
        if not raw:
            return
        if self.place.model is not None:
            config = self.place.model.config.get_text_config()
            if len(logit_transforms(config, 1)) > 1:
                raise ValueError(
                    f"{type(self.place.model).__name__} changes its logits after its output head, and the training step"
                    " calls the head alone, so OutputEntropyMonitor cannot see the final ones. Call the whole model, or"
                    " take the loss from `linear_cross_entropy`, which tells the monitor its softcap and scale."
                )
        for logits in raw:
            self.observe(logits.detach(), None)


def _logits_in(output: Any, raw: Tensor) -> Tensor | None:
    """What looks like the raw logits after the model has changed them: as many rows, and no more columns."""
    values: Any = (output,)
    if isinstance(output, Mapping):
        values = (output.get("logits"), *output.values())
    elif isinstance(output, tuple | list):
        values = output
    for value in values:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape[:-1] != raw.shape[:-1]:
            continue
        if raw.shape[-1] // 2 < value.shape[-1] <= raw.shape[-1]:
            return value
    return None


def _given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name."""
    names = list(inspect.signature(module.forward).parameters)
    return dict(zip(names, args, strict=False)) | kwargs


def next_tokens(given: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor | None:
    """The token after each position that the model is trained on, -100 elsewhere; None if that is unknown.

    Args:
        given: arguments of a causal language model: its ``labels`` if it has got any (``shift_labels`` are moved
            already), else the ``input_ids`` that ``attention_mask`` keeps.
        shape: of the logits without the vocabulary; the last positions, if there are fewer than tokens.

    Example::

        >>> next_tokens({"labels": torch.tensor([[-100, 6, 7]])}, (1, 3))
        tensor([[   6,    7, -100]])
    """
    shifted, labels, ids = given.get("shift_labels"), given.get("labels"), given.get("input_ids")
    if isinstance(shifted, Tensor):
        return shifted.reshape(shape) if shifted.numel() == math.prod(shape) else None
    if not isinstance(labels, Tensor):
        if not isinstance(ids, Tensor):
            return None
        mask = given.get("attention_mask")
        labels = ids.masked_fill(mask == 0, -100) if isinstance(mask, Tensor) and mask.shape == ids.shape else ids
    targets = F.pad(labels[..., 1:], (0, 1), value=-100)
    kept = given.get("logits_to_keep")
    if isinstance(kept, int) and kept:
        targets = targets[..., -kept:]
    return targets if targets.shape == shape else None
