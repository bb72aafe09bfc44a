"""The training commands: LightningCLI with run folders, default callbacks, short errors and resuming."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.model_helpers import is_overridden

import litropy.recipes  # noqa: F401 (so that short class names are known)
from litropy.callbacks import (
    Curves,
    HuggingFaceFolder,
    LastCheckpoint,
    MetricsFile,
    RunReport,
    StepProgressBar,
    Throughput,
)
from litropy.chosen_class import chosen_class
from litropy.parse_errors import shorten
from litropy.run_folder import config_name, next_version, run_of_last_checkpoint

__all__ = ["CommandLine", "UserError"]

# ranks that are started as subprocesses take the folder that the first one chose
_VERSION_VARIABLE = "LITROPY_RUN_VERSION"
_COMMANDS = {
    "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
    "validate": {"model", "dataloaders", "datamodule", "weights_only"},
    "test": {"model", "dataloaders", "datamodule", "weights_only"},
    "predict": {"model", "dataloaders", "datamodule", "weights_only", "return_predictions"},
}


class UserError(Exception):
    """A mistake on the command line; its message is all that the user needs to see."""


class Parser(LightningArgumentParser):
    """Says in a line or two what is wrong."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # an abbreviated option would take effect, but not be found when the command is repeated
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Raise the shortened message."""
        raise UserError(shorten(message, self._option_names(), self._class_names)) from ex

    def _option_names(self) -> list[str]:
        parsers = [self, *(self._subcommands_action.choices.values() if self._subcommands_action else [])]
        return [action.dest for parser in parsers for action in parser._actions]

    def _class_names(self, key: str) -> list[str]:
        base: type = {"model": LightningModule, "data": pl.LightningDataModule, "trainer.logger": Logger}.get(
            key, Callback
        )
        return [cls.__name__ for cls in _subclasses(base)]


def _subclasses(base: type) -> Iterable[type]:
    cls: type
    for cls in base.__subclasses__():
        yield cls
        yield from _subclasses(cls)


class RunConfig(SaveConfigCallback):
    """Write ``config.yaml`` into the run folder, and let a continued run go on with its metrics file."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the config of a fit."""
        if stage == "fit" and trainer.loggers and not self.already_saved:
            # the saved config starts a run, whatever this command went on from
            self.config = self.config.clone()
            self.config.ckpt_path = None
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what a killed run logged after its last checkpoint."""
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile) and trainer.global_step:
                # a checkpoint holds the number of its own step: Lightning counts on only after saving
                logger.continue_at(trainer.fit_loop.epoch_loop._batches_that_stepped + 1)


class CommandLine(LightningCLI):
    """``litropy fit | validate | test | predict``.

    Args:
        args: arguments after ``litropy``, with the paths of config files resolved.
        run: whether to run the command, or only to build everything.
    """

    def __init__(self, args: list[str], run: bool = True) -> None:
        self.run = run
        self.arguments = args
        usage = {command: {"usage": f"litropy {command} --config FILE [options]"} for command in _COMMANDS}
        super().__init__(
            args=args,
            parser_class=Parser,
            parser_kwargs={"prog": "litropy", **usage},
            trainer_defaults={"log_every_n_steps": 10, "enable_model_summary": False},
            save_config_callback=RunConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
        )

    # parsing

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, and which arguments of the Trainer's methods they do not take."""
        return _COMMANDS

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make our own classes the default, or those that the user chooses."""
        for key, default in (("model", "litropy.recipes.LanguageModel"), ("data", "litropy.recipes.TextDataModule")):
            parser.set_defaults({key: {"class_path": default}})
            chosen = chosen_class(self.arguments, key, default)
            with suppress(ValueError):  # parsing says what is wrong with the name of a class
                parser.set_defaults({key: {"class_path": chosen}})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Leave the model to the config; Lightning would take its arguments from the checkpoint."""

    # the run folder

    def before_instantiate_classes(self) -> None:
        """Choose the run folder, and resolve ``--ckpt_path last``."""
        config = self.config[self.subcommand]
        paths = [str(path) for path in config.get("config") or [] if path is not None]
        model = config.model.class_path.rpartition(".")[2] if config.get("model") else "run"
        self.name = config_name(paths, default=model)
        self.root = Path(config.trainer.default_root_dir or "runs")
        config.trainer.default_root_dir = str(self.root)
        self.version: int | None = None
        if config.get("ckpt_path") == "last":
            try:
                self.version, path = run_of_last_checkpoint(self.root / self.name)
            except ValueError as error:
                raise UserError(str(error)) from None
            config.ckpt_path = str(path)
        elif config.get("ckpt_path") and not Path(config.ckpt_path).exists():
            raise UserError(f"--ckpt_path: there is no checkpoint {config.ckpt_path!r}; `last` finds the newest one.")
        elif self.subcommand == "fit":
            self.version = self._new_version()

    def _new_version(self) -> int:
        if os.environ.get("LOCAL_RANK", "0") != "0" and _VERSION_VARIABLE in os.environ:
            return int(os.environ[_VERSION_VARIABLE])
        version = next_version(self.root / self.name)
        os.environ[_VERSION_VARIABLE] = str(version)
        return version

    # the trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        given = config.get("callbacks") or []
        given = list(given) if isinstance(given, list) else [given]
        config["callbacks"] = given + [
            callback
            for callback in self._default_callbacks(config)
            if not any(isinstance(other, _kind(callback)) for other in given)
        ]
        config["logger"] = self._loggers(config.get("logger"), bool(config.get("fast_dev_run")))
        return super()._instantiate_trainer(config, callbacks)

    def _default_callbacks(self, config: dict[str, Any]) -> list[Callback]:
        callbacks: list[Callback] = []
        if config.get("enable_progress_bar") is not False:
            callbacks.append(StepProgressBar())
        if self.subcommand != "fit":
            return callbacks
        callbacks.append(Throughput())
        if config.get("logger") is not False and not config.get("fast_dev_run"):
            if config.get("enable_checkpointing") is not False:
                callbacks += self._default_checkpoints(config)
                callbacks.append(HuggingFaceFolder())
            callbacks.append(Curves())
        return [*callbacks, RunReport()]

    def _default_checkpoints(self, config: dict[str, Any]) -> list[Callback]:
        validates = (
            config.get("limit_val_batches") != 0
            and self.datamodule is not None
            and is_overridden("val_dataloader", self.datamodule, pl.LightningDataModule)
            and is_overridden("validation_step", self.model)
        )
        monitor, mode = getattr(self.model, "best_metric", ("val/loss", "min"))
        best = ModelCheckpoint(filename="best", monitor=monitor, mode=mode, enable_version_counter=False)
        return [*([best] if validates else []), LastCheckpoint()]

    def _loggers(self, given: Any, fast_dev_run: bool) -> list[Logger] | bool:
        if given is False or fast_dev_run:
            return False
        named = [] if given is None or given is True else list(given) if isinstance(given, Iterable) else [given]
        if self.subcommand != "fit":
            return named or False
        run: dict[str, Any] = {"save_dir": str(self.root), "name": self.name, "version": self.version}
        # metrics.csv is read by the curves and by --ckpt_path last; naming a logger replaces TensorBoard alone
        own = [] if any(isinstance(logger, CSVLogger) for logger in named) else [MetricsFile(**run)]
        return [*own, *(named or [TensorBoardLogger(**run, default_hp_metric=False)])]

    # running

    def _run_subcommand(self, subcommand: str) -> None:
        if self.run:
            super()._run_subcommand(subcommand)

    def predict(self, model: LightningModule, **kwargs: Any) -> None:
        """Generate, and keep what was generated in ``predictions``."""
        self.predictions = self.trainer.predict(model, **kwargs)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C has stopped the command."""
        trainer = getattr(self, "trainer", None)
        return trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED

    @property
    def can_resume(self) -> bool:
        """Whether there is a ``last.ckpt`` of this run."""
        paths = [
            callback.path for callback in getattr(self.trainer, "callbacks", []) if isinstance(callback, LastCheckpoint)
        ]
        return any(path is not None and path.exists() for path in paths)


def _kind(callback: Callback) -> type:
    """What a callback of the user must be to replace a default one."""
    if isinstance(callback, StepProgressBar):
        return ProgressBar
    return type(callback)
