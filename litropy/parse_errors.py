"""Turn the parser's long error messages into one or two lines that say what to do."""

import difflib
import re
from collections.abc import Callable, Iterable

__all__ = ["did_you_mean", "shorten"]

_FROM_PARSER = re.compile(r"Parser key|Union subtypes|Subcommand '|[Oo]ption '|[Uu]nrecognized arg|dot import path")
_KEY = re.compile(r'Parser key "([^"]+)"')
_NOT_ACCEPTED = re.compile(r"does not accept option '([^']+)'|[Oo]ption '([^']+)' is not accepted")
_NO_CLASS = re.compile(r"Expected a dot import path string: (.+)")
_UNRECOGNISED = re.compile(r"[Uu]nrecognized arguments?: (\S+)")
_NOISE = re.compile(
    r"Does not validate against any of the Union subtypes|^Subtypes: |^Errors:$|^expected NoneType"
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
    options: Iterable[str] = (),
    class_names: Callable[[str], Iterable[str]] = lambda key: (),
) -> str:
    """Shorten an error message of the parser; another message stays as it is.

    Args:
        message: what the parser says.
        options: names of all options, such as ``trainer.max_steps``.
        class_names: gives the short names of the classes that a key may take.

    Returns:
        The message without the parser's internals, with "Did you mean" where something known is near.
    """
    if not _FROM_PARSER.search(message):
        return message
    keys = _KEY.findall(message)
    key = keys[0] if keys else ""
    if found := _NOT_ACCEPTED.search(message):
        option = found[1] or found[2]
        return f"There is no option {option!r}.{did_you_mean(option, options)}"
    if found := _UNRECOGNISED.search(message):
        option = found[1].partition("=")[0]
        if not option.startswith("-"):
            return f"Unexpected argument {option!r}: options start with --, as in --config FILE."
        return f"There is no option {option}.{did_you_mean(option, [f'--{name}' for name in options])}"
    if found := _NO_CLASS.search(message):
        name = found[1].strip()
        return f"{key}: there is no class {name!r}.{did_you_mean(name, class_names(key))}"
    return _under(keys, _essence(message))


def _essence(message: str) -> str:
    lines: list[str] = []
    for line in message.splitlines():
        text = _plain(line.strip().removeprefix("- ").strip())
        if text and not _NOISE.search(text) and text not in lines:
            lines.append(text)
    if all(line.startswith("expected ") for line in lines):
        lines = [", or ".join(lines)]
    return "\n  ".join(lines[:5]) or message.splitlines()[0]


def _under(keys: list[str], text: str) -> str:
    if not keys or text.startswith(keys[0]):
        return text
    # the error of a nested option begins with the option's own name
    return f"{keys[0]}.{text}" if re.match(r"\w+: ", text) else f"{'.'.join(keys)}: {text}"


def _plain(line: str) -> str:
    """Say in words which type was expected."""
    line = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", line)
    line = re.sub(r"Expected an? typing\.Literal\[(.*?)\]", r"expected one of \1", line)
    line = re.sub(r"Expected an? ([^.]+)\. Got value: (.*)", r"expected \1, got '\2'", line)
    return line.replace("Expected a ", "expected ")
