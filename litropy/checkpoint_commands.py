"""``litropy export | verify | decompress``: compressed folders and files on the command line."""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["CHECKPOINT_COMMANDS", "run_checkpoint_command"]

CHECKPOINT_COMMANDS = {
    "export": "compress a Hugging Face folder, or the model of a training checkpoint, bit for bit",
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
            with _plain_folder(options) as source:
                report = compress_folder(
                    source, options.destination, codec=options.codec, threads=options.threads, progress=progress
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
    file = {"verify": " or file", "export": ", or checkpoint (.ckpt) of `litropy fit`"}.get(command, "")
    parser.add_argument("source", type=Path, help=f"folder{file}")
    if command != "verify":
        parser.add_argument("destination", type=Path, help="folder to write; it must not exist")
    if command == "export":
        tokenizer = "folder or name of a checkpoint's tokenizer (default: that of its run, if training has ended)"
        parser.add_argument("--tokenizer", help=tokenizer)
        parser.add_argument("--codec", choices=("auto", "zstd", "rans", "raw"), default="auto", help="default: auto")
    parser.add_argument("--threads", type=int, default=1, help="chunks to code at the same time (default: 1)")
    return parser


@contextmanager
def _plain_folder(options: argparse.Namespace) -> Iterator[Path]:
    """The folder to compress: the source itself, or what its checkpoint becomes."""
    if not options.source.is_file():
        if options.tokenizer is not None:
            raise ValueError(f"--tokenizer is for checkpoints; {options.source} is a folder, and has its own.")
        yield options.source
        return
    if options.destination.exists():
        raise ValueError(f"{options.destination} exists and is not overwritten. Give another name, or delete it.")
    from transformers.utils.logging import disable_progress_bar

    from litropy.recipes.exported_checkpoint import export_checkpoint

    disable_progress_bar()
    folder = options.destination.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{options.destination.name}.", dir=folder) as scratch:
        export_checkpoint(options.source, Path(scratch, "plain"), options.tokenizer)
        yield Path(scratch, "plain")


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
