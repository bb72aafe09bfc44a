"""Where a run writes: ``<root>/<config name>/version_N``, and how a later command finds it again."""

import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["LAST_CHECKPOINT", "config_name", "next_version", "run_of_last_checkpoint", "without_option"]

LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")
_VERSION = re.compile(r"version_(\d+)")


def config_name(configs: Sequence[str | Path], default: str) -> str:
    """Name a run after its first config file.

    A ``config.yaml`` inside a run folder belongs to the config that made the folder.

    Args:
        configs: the config files of a command, in order.
        default: name if there is none.

    Example::

        >>> config_name(["quickstart/pretrain_cpu.yaml", "steering/clip.yaml"], "LanguageModel")
        'pretrain_cpu'
        >>> config_name(["runs/pretrain_cpu/version_3/config.yaml"], "LanguageModel")
        'pretrain_cpu'
    """
    if not configs:
        return default
    path = Path(configs[0]).absolute()
    if path.name == "config.yaml" and _VERSION.fullmatch(path.parent.name):
        return path.parent.parent.name
    return path.stem


def _versions(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    matches = ((_VERSION.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return {int(match[1]): path for match, path in matches if match}


def next_version(folder: Path) -> int:
    """Return the number of the next run: one more than the highest ``version_N`` in a folder."""
    return max(_versions(folder), default=-1) + 1


def run_of_last_checkpoint(folder: Path) -> tuple[int, Path]:
    """Find the run that saved its ``last.ckpt`` most recently.

    Args:
        folder: where the runs of one config are, ``<root>/<config name>``.

    Returns:
        The run's version and the checkpoint's path (a file, or a folder if it is sharded).

    Raises:
        ValueError: if no run has a ``last.ckpt``.
    """
    found = {version: path / LAST_CHECKPOINT for version, path in _versions(folder).items()}
    found = {version: path for version, path in found.items() if path.exists()}
    if not found:
        raise ValueError(
            f"--ckpt_path last: no run in {folder} has a {LAST_CHECKPOINT}."
            " Leave --ckpt_path out to start from the beginning, or give the path of a checkpoint."
        )
    version = max(found, key=lambda version: (_modified(found[version]), version))
    return version, found[version]


def _modified(path: Path) -> int:
    files = [path, *path.iterdir()] if path.is_dir() else [path]
    return max(file.stat().st_mtime_ns for file in files)


def without_option(argv: Sequence[str], option: str) -> list[str]:
    """Return the arguments without an option and its value.

    Example::

        >>> without_option(["fit", "--ckpt_path", "last", "--ckpt_path=x", "--config", "a.yaml"], "--ckpt_path")
        ['fit', '--config', 'a.yaml']
    """
    kept: list[str] = []
    skip = False
    for word in argv:
        if skip:
            skip = False
        elif word == option:
            skip = True
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return kept
