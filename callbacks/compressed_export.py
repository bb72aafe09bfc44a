"""At the end of training, leave the model as a compressed folder that ``from_pretrained`` loads."""

import shutil
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from litropy.callbacks.compressed_folder import compress_folder
from litropy.kernels.tensor_codec_layout import Codec

__all__ = ["CompressedExport"]


class CompressedExport(Callback):
    """Write weights, config and tokenizer when training ends, compressed bit for bit, and check that they read back.

    Takes what ``pl_module.save_pretrained(folder)`` writes. With ``import litropy.huggingface``, the folder loads by
    ``from_pretrained(folder, variant="litropy")``; without, every way of loading it is an error.

    Args:
        folder: where to write; None takes ``hugging_face_litropy`` in the run folder. It must not exist.
        codec: zstd, rans (a GPU decodes it), raw, or auto for the smaller.
        threads: how many chunks to code at the same time.

    Raises:
        ValueError: if ``threads`` is below 1; when training starts, if the folder exists or the module has no
            ``save_pretrained``.

    Example::

        trainer = Trainer(callbacks=[CompressedExport()])
    """

    def __init__(self, folder: str | Path | None = None, codec: Codec = "auto", threads: int = 1) -> None:
        if threads < 1:
            raise ValueError(f"`threads` is {threads}; it must be at least 1.")
        self.folder = folder
        self.codec: Codec = codec
        self.threads = threads
        self._target: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agree on the folder, and find out now what would fail after training."""
        if stage != "fit":
            return
        if not hasattr(pl_module, "save_pretrained"):
            raise ValueError(f"{type(pl_module).__name__} has no `save_pretrained(folder)`, so it cannot be exported.")
        # log_dir is a collective call
        run = Path(trainer.log_dir or trainer.default_root_dir)
        self._target = Path(self.folder or run / "hugging_face_litropy").absolute()
        if self._target.exists():
            raise ValueError(f"{self._target} exists and is not overwritten. Give `folder` another name, or delete it.")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder; every rank takes part, because weights may be sharded."""
        if getattr(trainer, "fast_dev_run", False):
            return
        assert self._target is not None
        plain = self._target.with_name(f".{self._target.name}.plain")
        pl_module.save_pretrained(plain)  # type: ignore[operator]
        try:
            if trainer.is_global_zero:
                report = compress_folder(plain, self._target, codec=self.codec, threads=self.threads)
                rank_zero_info(f"Compressed to {report['ratio']:.1%} in {self._target}")
                shutil.rmtree(plain)
        finally:
            trainer.strategy.barrier()
