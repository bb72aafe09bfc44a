"""Which class a command line chooses, known before the command line is parsed."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

__all__ = ["chosen_class"]


def chosen_class(arguments: Sequence[str], key: str, default: str) -> str:
    """Find the last ``class_path`` that config files or options give to ``key``.

    A parser that starts from another class keeps that class's defaults for all options which both have.

    Args:
        arguments: of the command line, with the paths of config files resolved.
        key: ``model`` or ``data``.
        default: what to return if none is chosen.

    Example::

        >>> chosen_class(["fit", "--model", "RLVR"], "model", "LanguageModel")
        'RLVR'
    """
    chosen = default
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for option, value in pairwise(words):
        if option in (f"--{key}", f"--{key}.class_path") and not value.startswith(("-", "{")):
            chosen = value
        elif option in ("-c", "--config"):
            chosen = _in_file(Path(value), key) or chosen
    return chosen


def _in_file(path: Path, key: str) -> str | None:
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None  # parsing says what is wrong
    section = content.get(key) if isinstance(content, dict) else None
    name = section.get("class_path") if isinstance(section, dict) else section
    return name if isinstance(name, str) else None
