"""Turn the parser's long error messages into one or two lines that say what to do."""

import difflib
import re
from collections.abc import Callable, Iterable

__all__ = ["did_you_mean", "shorten"]

_KEY = re.compile(r'Parser key "([^"]+)"')
_NOT_ACCEPTED = re.compile(
    r"does not accept option '([^']+)'|[Oo]ption '([^']+)' is not accepted|[Kk]ey '([^']+)' is not"
)
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_NO_CLASS = re.compile(r"Expected a dot import path string: (.+)")
_UNRECOGNISED = re.compile(r"[Uu]nrecognized arguments?: (\S+)")
_NOISE = re.compile(
    r"Does not validate against any of the Union subtypes|^Subtypes: |^Errors:$|Expected a <class 'NoneType'>"
    r"|^Given value( type)?: |Expected a path but .* either not accessible or invalid|^Parser key \"[^\"]+\":?$"
    r"|^Problem with given class_path|^Not a valid subclass of|^Subclass types expect one of|^a (class path|dict with)"
)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a sentence that names the nearest known word, or an empty string.

    Example::

        >>> did_you_mean("trainer.max_step", ["trainer.max_steps", "trainer.devices"])
        ' Did you mean trainer.max_steps?'
        >>> did_you_mean("zzz", ["trainer.max_steps"])
        ''
    """
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


def shorten(
    message: str,
    options: Iterable[str],
    class_options: Callable[[str], Iterable[str]],
    class_names: Callable[[str], Iterable[str]],
) -> str:
    """Shorten an error message of the parser.

    Args:
        message: what the parser says.
        options: names of all options, such as ``trainer.max_steps``.
        class_options: gives the constructor arguments of a class by its import path.
        class_names: gives the short names of the classes that a key may take.

    Returns:
        The message without the parser's internals, with "Did you mean" where something known is near.
    """
    keys = _KEY.findall(message)
    key = keys[0] if keys else ""
    if found := _NOT_ACCEPTED.search(message):
        option = next(group for group in found.groups() if group)
        if owner := _CLASS.search(message):
            name = owner[1].rpartition(".")[2]
            return f"{key}: {name} has no option {option!r}.{did_you_mean(option, class_options(owner[1]))}"
        return f"There is no option {option!r}.{did_you_mean(option, options)}"
    if found := _UNRECOGNISED.search(message):
        option = found[1].partition("=")[0]
        if not option.startswith("-"):
            return f"Unexpected argument {option!r}: options start with --, as in --config FILE."
        return f"There is no option {option}.{did_you_mean(option, [f'--{name}' for name in options])}"
    if found := _NO_CLASS.search(message):
        name = found[1].strip()
        return f"{key}: there is no class {name!r}.{did_you_mean(name, class_names(key))}"
    lines = []
    for line in message.splitlines():
        text = line.strip().removeprefix("- ").strip()
        if text and not _NOISE.search(text) and text not in lines:
            lines.append(re.sub(r"<class '([\w.]+)'>", r"\1", text))
    text = "\n  ".join(lines[:5]) or message.splitlines()[0]
    path = ".".join(keys)
    return f"{path}: {text}" if path and not text.startswith("Parser key") else text
