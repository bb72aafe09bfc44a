"""The packaged YAML configs: find one by name from any folder, list them, show one, copy one."""

import difflib
import shutil
from importlib.resources import files
from pathlib import Path

import yaml  # type: ignore[import-untyped]

__all__ = ["check_yaml", "config_table", "copy_config", "find_config", "first_header_line", "packaged_configs"]


def packaged_configs() -> dict[str, Path]:
    """Map every packaged config's name, such as ``quickstart/pretrain_cpu.yaml``, to its path."""
    root = Path(str(files("litropy.configs")))
    return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find_config(name: str) -> Path:
    """Find a config file: a file of that name first, then a packaged config; the suffix ``.yaml`` may be left out.

    Args:
        name: path of a file, or name of a packaged config.

    Returns:
        The path of the file.

    Raises:
        ValueError: if there is neither; the message names the nearest packaged configs.
    """
    packaged = packaged_configs()
    for candidate in (name, f"{name}.yaml"):
        if Path(candidate).is_file():
            return Path(candidate)
        if candidate in packaged:
            return packaged[candidate]
    # a bare file name should find its folder, and a slip of the finger its file
    by_file_name = [known for known in packaged if Path(known).stem == Path(name).stem]
    near = by_file_name or difflib.get_close_matches(name, [*packaged, *(k.removesuffix(".yaml") for k in packaged)])
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"There is no config {name!r}, neither in {Path.cwd()} nor among the packaged ones.{hint}"
        " `litropy configs list` shows the packaged ones."
    )


def check_yaml(path: Path) -> None:
    """Check that a config can be read.

    Raises:
        ValueError: with file, line and column of a mistake.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{path}{place}: {error.problem or 'this is no YAML'}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} has no options in it; a config has keys such as `model:`, `data:` and `trainer:`.")


def first_header_line(path: Path) -> str:
    """Return the first line of a config's header comment, which says what it is for; empty if there is no header."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").rstrip()
        if line.strip():
            break
    return ""


def config_table() -> str:
    """Return the packaged configs as lines of text: name and purpose."""
    rows = {name: first_header_line(path) for name, path in packaged_configs().items()}
    width = max(map(len, rows), default=0)
    return "\n".join(f"{name:<{width}}  {purpose}".rstrip() for name, purpose in rows.items())


def copy_config(name: str, destination: str | None = None) -> Path:
    """Copy a config to where it can be edited.

    Args:
        name: name of a packaged config, or path of a file.
        destination: file or folder to copy to; None takes the current folder.

    Returns:
        The path of the copy.

    Raises:
        ValueError: if there is no such config, or the destination exists already.
    """
    source = find_config(name)
    target = Path(destination) if destination else Path()
    if target.is_dir() or not target.suffix:
        target = target / source.name
    if target.exists():
        raise ValueError(f"{target} exists already and is not overwritten. Give another name, or delete it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(source, target))
