"""The help pages, made without importing torch: options come from the source of the classes."""

import ast
import re
import textwrap
from importlib.util import find_spec
from pathlib import Path

from litropy.checkpoint_commands import CHECKPOINT_COMMANDS

__all__ = ["COMMANDS", "command_help", "configs_help", "documented_arguments", "main_help"]

COMMANDS = {
    "fit": "train a model",
    "validate": "compute the held-out loss of a checkpoint",
    "test": "compute the test loss of a checkpoint",
    "predict": "continue prompts with a checkpoint",
}
_CONFIGS = {
    "list": "name and purpose of the packaged configs",
    "show NAME": "print a config",
    "copy NAME [DESTINATION]": "copy a config to edit it",
}
_COMMON = {
    "-c, --config FILE": "config: a file, or a packaged one; a second one adds to the first",
    "--ckpt_path PATH": "checkpoint to go on from, or to use; `last` finds the newest of this config",
    "--seed_everything SEED": "seed of everything random (default: 0)",
    "--print_config": "print all options with their values, and stop",
}
_TRAINER = {
    "max_steps": "optimiser steps to train",
    "max_time": "time to train, as DD:HH:MM:SS",
    "devices": "how many devices (default: auto)",
    "accelerator": "cpu, gpu, auto",
    "strategy": "ddp, ModelParallelStrategy (FSDP2), auto",
    "precision": "32-true, bf16-mixed, bf16-true, ...",
    "accumulate_grad_batches": "batches to an optimiser step",
    "gradient_clip_val": "largest gradient norm",
    "val_check_interval": "batches between two validations",
    "log_every_n_steps": "steps between two logged ones (default: 10)",
    "logger": "another logger, such as WandbLogger, instead of TensorBoard; false: log nothing",
    "callbacks+": "add a callback, such as EarlyStopping",
    "default_root_dir": "folder of all runs (default: runs)",
}
_CLASSES = {
    "model": ("LanguageModel", "litropy.recipes.language_model"),
    "data": ("TextDataModule", "litropy.recipes.text_data"),
}


def main_help() -> str:
    """Return what ``litropy --help`` prints."""
    commands = {name: f"{text}" for name, text in COMMANDS.items()}
    return "\n".join(
        [
            "litropy: train language models through a loss that never stores logits",
            "",
            "usage: litropy COMMAND [options]",
            "",
            _rows(commands | CHECKPOINT_COMMANDS | {"configs": "list, show or copy the packaged configs"}),
            "",
            "litropy COMMAND --help shows the options of a command. To begin with:",
            "",
            "  litropy fit --config quickstart/pretrain_cpu.yaml",
        ]
    )


def configs_help() -> str:
    """Return what ``litropy configs --help`` prints."""
    return "\n".join(["usage: litropy configs [ACTION]", "", _rows(_CONFIGS)])


def command_help(command: str) -> str:
    """Return what the help of a training command prints.

    Args:
        command: one of ``COMMANDS``.
    """
    parts = [
        f"litropy {command}: {COMMANDS[command]}",
        f"\nusage: litropy {command} --config FILE [options]\n",
        _rows(_COMMON),
        "\nTrainer (the options used most; --trainer.OPTION VALUE, or under `trainer:` in the config)\n",
        _rows(_TRAINER),
    ]
    for key, (name, module) in _CLASSES.items():
        arguments = documented_arguments(module, name)
        if arguments:
            parts += [f"\n{name} (--{key}.OPTION VALUE, or under `{key}:`)\n", _rows(arguments)]
    parts += [
        "\nAll options of the trainer, and all values: litropy fit --print_config.",
        "Another model or data class: --model CLASS or --data CLASS; its options: --model.help CLASS.",
    ]
    return "\n".join(parts)


def documented_arguments(module: str, name: str) -> dict[str, str]:
    """Read a class's arguments, their defaults and their help from its source.

    Args:
        module: import path of the module; it is found, but not imported.
        name: name of the class.

    Returns:
        Argument and help, empty if there is no such module or class.
    """
    path = _source(module)
    if path is None:
        return {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            helps = _args_section(ast.get_docstring(node) or "")
            return {
                argument: helps.get(argument, "") + (f" (default: {default})" if default else "")
                for argument, default in _defaults(node).items()
            }
    return {}


def _source(module: str) -> Path | None:
    package, _, file = module.rpartition(".")
    try:
        # the package's own __init__ may import torch, so only its folder is looked up
        spec = find_spec(package.partition(".")[0])
    except ModuleNotFoundError:
        return None
    for root in (spec.submodule_search_locations or []) if spec else []:
        path = Path(root, *package.split(".")[1:], f"{file}.py")
        if path.is_file():
            return path
    return None


def _defaults(node: ast.ClassDef) -> dict[str, str]:
    for function in node.body:
        if isinstance(function, ast.FunctionDef) and function.name == "__init__":
            arguments = function.args.args[1:]
            values = [ast.unparse(value).strip("'") for value in function.args.defaults]
            values = [""] * (len(arguments) - len(values)) + values
            values = ["" if value == "None" else value for value in values]
            return {argument.arg: value for argument, value in zip(arguments, values, strict=True)}
    return {}


def _args_section(docstring: str) -> dict[str, str]:
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", docstring, re.MULTILINE)
    entries: dict[str, str] = {}
    name = ""
    for line in textwrap.dedent(section[1]).splitlines() if section else []:
        if match := re.match(r"(\w+): (.*)", line):
            name = match[1]
            entries[name] = match[2]
        elif name and line.strip():
            entries[name] += f" {line.strip()}"
    return {key: text.replace("``", "").rstrip(".") for key, text in entries.items()}


def _rows(rows: dict[str, str]) -> str:
    width = min(26, max(map(len, rows)))
    lines = []
    for name, text in rows.items():
        wrapped = textwrap.wrap(text, 100 - width) or [""]
        lines.append(f"  {name:<{width}}  {wrapped[0]}".rstrip())
        lines += [f"  {'':<{width}}  {line}" for line in wrapped[1:]]
    return "\n".join(lines)
