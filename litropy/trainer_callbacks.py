"""What Lightning adds to every ``Trainer`` where litropy is installed; it looks for this by an entry point."""

import sys
from typing import Any

__all__ = ["trainer_callbacks"]


def trainer_callbacks() -> list[Any]:
    """A callback that refuses strategies which would bypass compressed checkpoints; none unless there may be such.

    Example:
        >>> import litropy.callbacks
        >>> [type(callback).__name__ for callback in trainer_callbacks()]
        ['RefuseSharded']
    """
    # nobody can have made the plugin whose module is not loaded; programs without it wait for nothing
    module = sys.modules.get("litropy.callbacks.compressed_checkpoint_io")
    return [] if module is None else [module.RefuseSharded()]
