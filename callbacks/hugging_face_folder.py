"""At the end of training, leave the model as a folder that ``from_pretrained`` loads."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

__all__ = ["HuggingFaceFolder"]


class HuggingFaceFolder(Callback):
    """Write weights, config and tokenizer when training ends, through ``pl_module.save_pretrained(folder)``.

    Args:
        folder: where to write; None takes ``hugging_face`` in the run folder.

    Example::

        trainer = Trainer(callbacks=[HuggingFaceFolder()])
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder; every rank takes part, because weights may be sharded."""
        save_pretrained = getattr(pl_module, "save_pretrained", None)
        if save_pretrained is None:
            rank_zero_warn(
                f"{type(pl_module).__name__} has no `save_pretrained(folder)`, so no Hugging Face folder is written."
            )
        elif not getattr(trainer, "fast_dev_run", False):
            save_pretrained(Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir, "hugging_face")))
