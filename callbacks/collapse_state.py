"""State of the collapse rules as plain lists and numbers, which any checkpoint can hold."""

from collections import deque
from typing import Any

import numpy as np

__all__ = ["PlainState"]


class PlainState:
    """Gives a class ``state_dict`` and ``load_state_dict``.

    Attributes:
        saved: names of the attributes that are state: numbers, lists, deques, arrays, None, or objects that have a
            ``state_dict`` themselves.
    """

    saved: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """The state, as dicts, lists and numbers."""
        return {name: _plain(getattr(self, name)) for name in self.saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        for name in self.saved:
            old, value = getattr(self, name), state_dict[name]
            if hasattr(old, "load_state_dict"):
                old.load_state_dict(value)
            elif isinstance(old, deque):
                setattr(self, name, deque(map(_array, value), old.maxlen))
            elif isinstance(value, list):
                setattr(self, name, _array(value))
            else:
                setattr(self, name, value)


def _plain(value: Any) -> Any:
    if hasattr(value, "state_dict"):
        return value.state_dict()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, deque | list | tuple):
        return [_plain(item) for item in value]
    return value


def _array(value: Any) -> Any:
    return np.asarray(value) if isinstance(value, list) else value
