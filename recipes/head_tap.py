"""Takes hidden states out of a model at its output head, without the logits."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["HeadTap", "own_forward", "restore_attribute"]


def own_forward(module: nn.Module, previous: Callable[..., Any] | None) -> Callable[..., Any]:
    """The ``forward`` of the module's class, unless the instance had one of its own, ``previous``."""
    return previous if previous is not None else type(module).forward.__get__(module)


def restore_attribute(module: nn.Module, name: str, previous: Any) -> None:
    """Give an attribute of an instance its value from before, None if there was none."""
    delattr(module, name)
    if previous is not None:
        setattr(module, name, previous)


class HeadTap:
    """In place of an output head's ``forward``: while open, it keeps the hidden states and computes no logits.

    It knows nothing of the model, so that a copy of the head (PEFT's ``modules_to_save``) is not one of the model.

    Args:
        head: the module that the model calls.
        num_rows: how many logits it gives for each hidden state.
    """

    def __init__(self, head: Any, num_rows: int) -> None:
        self.head = head
        self.num_rows = num_rows
        self.previous = vars(head).get("forward")
        self.is_open = False
        self.hidden: Tensor | None = None

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute logits, or while open an empty tensor."""
        if not self.is_open:
            return own_forward(self.head, self.previous)(hidden, *args, **kwargs)
        if args or any(value is not None for value in kwargs.values()):
            raise ValueError(
                f"The output head {type(self.head).__name__} got more than hidden states ({', '.join(kwargs)}), and the"
                " loss without logits does not know what it does with that; unpatch_causal_lm(model) for such calls."
            )
        if self.hidden is not None:
            raise ValueError("The model called its output head twice; unpatch_causal_lm(model) and use its own loss.")
        self.hidden = hidden
        # no positions, so whatever the model does to its logits costs nothing
        return hidden.new_empty(*hidden.shape[:-2], 0, self.num_rows)

    def close(self) -> None:
        """Forget the hidden states, and compute logits again."""
        self.is_open, self.hidden = False, None

    def install(self) -> None:
        """Take the place of the head's ``forward``."""
        self.head.forward = self

    def remove(self) -> None:
        """Give it back."""
        # a wrapper that something has put around this since (a hook of accelerate) stays, and finds the head's own
        if vars(self.head).get("forward") is self:
            restore_attribute(self.head, "forward", self.previous)
