"""``litropy export | verify | decompress``: compressed folders and files on the command line."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["CHECKPOINT_COMMANDS", "run_checkpoint_command"]

CHECKPOINT_COMMANDS = {
    "export": "compress a Hugging Face folder, bit for bit",
    "verify": "check every byte of a compressed file or folder",
    "decompress": "write a compressed folder as the plain one that it was",
}


def run_checkpoint_command(command: str, arguments: Sequence[str]) -> None:
    """Run one of ``CHECKPOINT_COMMANDS``.

    Args:
        command: its name.
        arguments: what follows it.

    Raises:
        ValueError: if a folder or file is not what the command needs, or is damaged.
        SystemExit: after ``--help`` and mistakes in the arguments.
    """
    options = _parser(command).parse_args(arguments)
    # these take a second to import, which a mistake above should not wait for
    from litropy.callbacks.compressed_folder import compress_folder, decompress_folder, verify

    with _progress(command) as progress:
        if command == "export":
            report = compress_folder(
                options.source, options.destination, codec=options.codec, threads=options.threads, progress=progress
            )
        elif command == "decompress":
            decompress_folder(options.source, options.destination, threads=options.threads, progress=progress)
        else:
            report = verify(options.source, threads=options.threads, progress=progress)
    if command == "decompress":
        print(f"Wrote {options.destination}")
    else:
        print(_summary(report))


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"litropy {command}", description=CHECKPOINT_COMMANDS[command])
    parser.add_argument("source", type=Path, help="folder" + (" or file" if command == "verify" else ""))
    if command != "verify":
        parser.add_argument("destination", type=Path, help="folder to write; it must not exist")
    if command == "export":
        parser.add_argument("--codec", choices=("auto", "zstd", "rans", "raw"), default="auto", help="default: auto")
    parser.add_argument("--threads", type=int, default=1, help="chunks to code at the same time (default: 1)")
    return parser


def _summary(report: dict[str, Any]) -> str:
    sizes = f"{report['tensor_bytes']:,} bytes in {report['file_bytes']:,} ({report['ratio']:.1%})"
    digests = (f"{name}  {digest}" for name, digest in report["digests"].items())
    return "\n".join([f"{report['tensors']} tensors, bit for bit: {sizes}", *digests])


@contextmanager
def _progress(command: str) -> Iterator[Callable[[int], None]]:
    """A count of bytes where there is a terminal."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn(command), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(command, total=None)
        yield lambda nbytes: progress.advance(task, nbytes)
