"""The ``litropy`` command."""

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence

from litropy import __version__
from litropy.checkpoint_commands import CHECKPOINT_COMMANDS, run_checkpoint_command
from litropy.config_files import check_yaml, config_table, copy_config, find_config
from litropy.help_pages import COMMANDS, command_help, configs_help, main_help
from litropy.parse_errors import did_you_mean, shorten
from litropy.run_folder import without_option

__all__ = ["main"]

_INTERRUPTED = 130  # what a shell reports for Ctrl-C


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: arguments after ``litropy``; None takes those of the process.

    Raises:
        SystemExit: with code 1 after an error, 2 after a mistake on the command line, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _dispatch(arguments)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from None


def _dispatch(arguments: list[str]) -> None:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print(main_help())
    elif command == "--version":
        print(f"litropy {__version__}")
    elif command == "configs":
        _configs(arguments[1:])
    elif command in CHECKPOINT_COMMANDS:
        _on_files(command, arguments[1:])
    elif command not in COMMANDS:
        _fail(
            f"There is no command {command!r}.{did_you_mean(command, [*COMMANDS, *CHECKPOINT_COMMANDS, 'configs'])}", 2
        )
    elif {"-h", "--help"} & set(arguments):
        print(command_help(command))
    else:
        _train(arguments)


def _fail(message: str, code: int) -> None:
    print(f"litropy: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def _configs(arguments: list[str]) -> None:
    action, *rest = arguments or ["list"]
    try:
        if action == "list" and not rest:
            print(config_table())
        elif action == "show" and len(rest) == 1:
            print(find_config(rest[0]).read_text(encoding="utf-8"), end="")
        elif action == "copy" and 1 <= len(rest) <= 2:
            print(f"Wrote {copy_config(*rest)}")
        elif action in ("-h", "--help"):
            print(configs_help())
        else:
            _fail(f"configs {' '.join(arguments)}: not understood.\n{configs_help()}", 2)
    except ValueError as error:
        _fail(str(error), 2)


def _on_files(command: str, arguments: list[str]) -> None:
    try:
        run_checkpoint_command(command, arguments)
    except (ValueError, OSError) as error:
        if os.environ.get("LITROPY_DEBUG", "0") not in ("", "0"):
            raise
        _fail(str(error), 1)


def _train(arguments: list[str]) -> None:
    debug = os.environ.get("LITROPY_DEBUG", "0") not in ("", "0")
    try:
        resolved = _with_found_configs(arguments)
    except ValueError as error:
        _fail(str(error), 2)
    # threads that spin while they wait make training ten times slower once another program needs a core
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from litropy.lightning_cli import CommandLine, UserError

    if not debug:
        _silence()
    command_line = CommandLine.__new__(CommandLine)
    try:
        command_line.__init__(resolved)  # type: ignore[misc]
    except UserError as error:
        if debug:
            raise
        _fail(str(error), 2)
    except (ValueError, OSError, MisconfigurationException) as error:
        if debug:
            raise
        _fail(f"{shorten(str(error))}\n(LITROPY_DEBUG=1 shows where this comes from)", 1)
    except SystemExit:
        if not command_line.interrupted:
            raise
        _say_how_to_resume(arguments, command_line.can_resume)
        raise SystemExit(_INTERRUPTED) from None
    answers = [answer for batch in getattr(command_line, "predictions", None) or [] for answer in batch]
    print(
        "\n---\n".join(f"{answer['prompt']}{answer['completion']}" for answer in answers), end="\n" if answers else ""
    )


def _with_found_configs(arguments: list[str]) -> list[str]:
    found = []
    previous = ""
    for word in arguments:
        name = (
            word if previous in ("-c", "--config") else word.partition("=")[2] if word.startswith("--config=") else ""
        )
        previous = word
        if name:
            path = find_config(name)
            check_yaml(path)
            word = f"--config={path}" if word.startswith("--config=") else str(path)
        found.append(word)
    return found


def _say_how_to_resume(arguments: list[str], can_resume: bool) -> None:
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    if can_resume:
        command = shlex.join(["litropy", *without_option(arguments, "--ckpt_path"), "--ckpt_path", "last"])
        print(f"\nStopped; last.ckpt is saved. This goes on from there:\n\n  {command}\n", file=sys.stderr)
    else:
        print("\nStopped; there was nothing to save yet.", file=sys.stderr)


def _silence() -> None:
    """Keep advertisements, and hints about what the config decides anyway, off the screen; shorten warnings."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", module="lightning.*")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    warnings.formatwarning = lambda message, *_, **__: f"litropy: warning: {message}\n"
