"""What Lightning adds to every ``Trainer`` where litropy is installed; it looks for this by an entry point."""

import sys
from typing import Any

__all__ = ["trainer_callbacks"]


def trainer_callbacks() -> list[Any]:
    """A callback that refuses strategies which would bypass compressed checkpoints; none unless there are such.

    Example:
        >>> from litropy.callbacks import CompressedCheckpointIO
        >>> plugin = CompressedCheckpointIO()
        >>> [type(callback).__name__ for callback in trainer_callbacks()]
        ['RefuseSharded']
    """
    # Lightning announces what it adds, and programs without the plugin should neither read that nor wait for an import
    module = sys.modules.get("litropy.callbacks.compressed_checkpoint_io")
    return [module.RefuseSharded()] if module is not None and module.CompressedCheckpointIO.made else []
