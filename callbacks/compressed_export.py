"""Leave the model as compressed folders that ``from_pretrained`` loads: when training ends, or at each save."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from litropy.callbacks.compressed_folder import compress_folder
from litropy.kernels.tensor_codec_layout import Codec

__all__ = ["CompressedExport"]


class CompressedExport(Callback):
    """Write weights, config and tokenizer of a model, compressed bit for bit, and check that they read back.

    Takes what ``pl_module.save_pretrained(folder)`` writes. With ``import litropy.huggingface``, the folder loads by
    ``from_pretrained(folder, variant="litropy")``; without, every way of loading it is an error.

    Args:
        folder: where to write; None takes ``hugging_face_litropy`` in the run folder. It must not exist, unless a run
            goes on that exports each save.
        codec: zstd, rans (a GPU decodes it), raw, or auto for the smaller.
        threads: how many chunks to code at the same time.
        when: end, the model as training leaves it; best, at the end, the one that ``ModelCheckpoint`` has kept as the
            best; save, a folder ``step_N`` for each step whose full checkpoint is saved, which waits for it.

    Raises:
        ValueError: if ``threads`` is below 1 or ``when`` is none of these; when training starts, if the folder exists,
            the module has no ``save_pretrained``, or nothing keeps the best checkpoint in one file.

    Example::

        trainer = Trainer(callbacks=[CompressedExport()])
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        codec: Codec = "auto",
        threads: int = 1,
        when: Literal["end", "best", "save"] = "end",
    ) -> None:
        if threads < 1:
            raise ValueError(f"`threads` is {threads}; it must be at least 1.")
        if when not in ("end", "best", "save"):
            raise ValueError(f"`when` is {when!r}; it must be 'end', 'best' or 'save'.")
        self.folder = folder
        self.codec: Codec = codec
        self.threads = threads
        self.when = when
        self._target: Path | None = None
        self._step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agree on the folder, and find out now what would fail after training."""
        if stage != "fit":
            return
        if not hasattr(pl_module, "save_pretrained"):
            raise ValueError(f"{type(pl_module).__name__} has no `save_pretrained(folder)`, so it cannot be exported.")
        # log_dir is a collective call
        run = Path(trainer.log_dir or trainer.default_root_dir)
        self._target = Path(self.folder or run / "hugging_face_litropy").absolute()
        if self.when != "save":
            self._refuse_to_overwrite()
        if self.when == "best" and not _off(trainer):
            _keeper_of_the_best(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let only a run that goes on add to the folders of its steps."""
        if self.when == "save" and not trainer.global_step:
            self._refuse_to_overwrite()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the folder of a step, once, however many checkpoints of it are saved."""
        if self.when != "save" or self._target is None or trainer.global_step == self._step or _off(trainer):
            return
        self._step = trainer.global_step
        target = self._target / f"step_{self._step}"
        # every rank has to come to the same answer
        if not trainer.strategy.broadcast(target.exists()):
            self._export(trainer, pl_module, target)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder; every rank takes part, because weights may be sharded."""
        if self.when == "save" or _off(trainer):
            return
        assert self._target is not None
        if self.when == "end":
            self._export(trainer, pl_module, self._target)
            return
        with _best_weights(trainer, pl_module):
            self._export(trainer, pl_module, self._target)

    def _refuse_to_overwrite(self) -> None:
        assert self._target is not None
        if self._target.exists():
            raise ValueError(f"{self._target} exists and is not overwritten. Give `folder` another name, or delete it.")

    def _export(self, trainer: Trainer, pl_module: LightningModule, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        plain = target.with_name(f".{target.name}.plain")
        pl_module.save_pretrained(plain)  # type: ignore[operator]
        try:
            if trainer.is_global_zero:
                report = compress_folder(plain, target, codec=self.codec, threads=self.threads)
                trainer.print(
                    f"Exported {report['tensors']} tensors, bit for bit: {report['tensor_bytes']:,} bytes in"
                    f" {report['file_bytes']:,} ({report['ratio']:.1%}), {report['seconds']:.1f} s, {target}"
                )
                shutil.rmtree(plain)
        finally:
            trainer.strategy.barrier()


def _off(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))


def _keeper_of_the_best(trainer: Trainer) -> ModelCheckpoint:
    if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
        raise ValueError(
            f"`when: best` reads the best checkpoint back, but {type(trainer.strategy).__name__} writes it in shards."
            " Use `when: save`, or a single device or DDP."
        )
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            return callback
    raise ValueError("`when: best` needs a ModelCheckpoint with a `monitor`, which says what is best; there is none.")


@contextmanager
def _best_weights(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """The module with the weights of the best checkpoint."""
    path = _keeper_of_the_best(trainer).best_model_path
    if not path:
        raise ValueError("`when: best`: no checkpoint has been saved, so none is the best. Validate at least once.")
    # waits for a thread that may still write the file
    trainer.strategy.checkpoint_io.teardown()
    best = trainer.strategy.load_checkpoint(path, weights_only=False)["state_dict"]
    last = {name: value.detach().cpu().clone() for name, value in pl_module.state_dict().items()}
    pl_module.load_state_dict(best)
    try:
        yield
    finally:
        pl_module.load_state_dict(last)
