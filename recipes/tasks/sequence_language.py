"""A small language whose programs make sequences of bytes, with its own parser and interpreter."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["FUNCTIONS", "MAX_LENGTH", "Statement", "parse", "program_bits", "run", "trace", "without_unused", "write"]

MAX_LENGTH = 1024
_MOST_STATEMENTS = 64
_LIST = "list"

Sequence = list[int]


class Statement(NamedTuple):
    """One line: ``name=function(arguments)``.

    Attributes:
        function: a key of ``FUNCTIONS``, or list for a literal.
        sequences: which earlier statements it reads, by their number from 0.
        numbers: its bytes.
    """

    function: str
    sequences: tuple[int, ...]
    numbers: tuple[int, ...]


class Function(NamedTuple):
    """What a name stands for: how many sequences and bytes it takes, in this order, and what it makes of them."""

    sequences: int
    numbers: int
    call: Callable[..., Sequence]


def _cut(values: Sequence) -> Sequence:
    return values[: MAX_LENGTH + 1]  # so that what is too long still shows, and costs nothing


def _interleave(x: Sequence, y: Sequence) -> Sequence:
    both = min(len(x), len(y))
    return [value for pair in zip(x, y, strict=False) for value in pair] + x[both:] + y[both:]


def _scan(x: Sequence) -> Sequence:
    total, sums = 0, []
    for value in x:
        total = (total + value) % 256
        sums.append(total)
    return sums


def _modulo(x: Sequence, y: Sequence) -> Sequence:
    if 0 in y[: len(x)]:
        raise ValueError("modulo by zero")
    return [a % b for a, b in zip(x, y, strict=False)]


def _mod(x: Sequence, k: int) -> Sequence:
    return _modulo(x, [k] * len(x))


def _every(x: Sequence, step: int) -> Sequence:
    if step == 0:
        raise ValueError("a step of zero")
    return x[::step]


FUNCTIONS: dict[str, Function] = {
    "up": Function(0, 3, lambda first, count, step: [(first + i * step) % 256 for i in range(count)]),
    "down": Function(0, 3, lambda first, count, step: [(first - i * step) % 256 for i in range(count)]),
    "fill": Function(0, 2, lambda value, count: [value] * count),
    "tile": Function(1, 1, lambda x, count: _cut(x * min(count, MAX_LENGTH))),
    "reverse": Function(1, 0, lambda x: x[::-1]),
    "replace": Function(1, 2, lambda x, old, new: [new if value == old else value for value in x]),
    "every": Function(1, 1, _every),
    "slice": Function(1, 2, lambda x, start, stop: x[start:stop]),
    "plus": Function(1, 1, lambda x, k: [(value + k) % 256 for value in x]),
    "minus": Function(1, 1, lambda x, k: [(value - k) % 256 for value in x]),
    "mod": Function(1, 1, _mod),
    "evens": Function(1, 0, lambda x: [value for value in x if value % 2 == 0]),
    "odds": Function(1, 0, lambda x: [value for value in x if value % 2]),
    "nonzero": Function(1, 0, lambda x: [value for value in x if value]),
    "scan": Function(1, 0, _scan),
    "add": Function(2, 0, lambda x, y: [(a + b) % 256 for a, b in zip(x, y, strict=False)]),
    "subtract": Function(2, 0, lambda x, y: [(a - b) % 256 for a, b in zip(x, y, strict=False)]),
    "modulo": Function(2, 0, _modulo),
    "concat": Function(2, 0, lambda x, y: x + y),
    "interleave": Function(2, 0, _interleave),
}
"""Arithmetic is modulo 256; of two sequences of different length, arithmetic takes the beginning of the longer."""

_LINE = re.compile(r"([a-z]) ?= ?(?:([a-z]{2,10})\(([a-z0-9, ]*)\)|\[([0-9, ]*)\])")


def parse(text: str) -> list[Statement]:
    """Read a program: statements in lines, or separated by semicolons.

    Args:
        text: anything.

    Raises:
        ValueError: if it is no program.

    Example::

        >>> parse("a=up(5,3,1); b=tile(a,2)")[1]
        Statement(function='tile', sequences=(0,), numbers=(2,))
    """
    lines = [line.strip(" \r") for line in text.replace(";", "\n").split("\n")]
    lines = [line for line in lines if line]
    if not 1 <= len(lines) <= _MOST_STATEMENTS:
        raise ValueError(f"{len(lines)} statements; a program has 1 to {_MOST_STATEMENTS}")
    program: list[Statement] = []
    names: dict[str, int] = {}
    for number, line in enumerate(lines):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"statement {number + 1} is not of the form name=function(arguments)")
        name, function, arguments, literal = match.groups()
        if function is None:
            program.append(Statement(_LIST, (), tuple(_byte(item) for item in _items(literal))))
        else:
            program.append(_call(function, _items(arguments), names))
        names[name] = number
    return program


def _items(text: str) -> list[str]:
    return [item.strip(" ") for item in text.split(",")] if text.strip(" ") else []


def _byte(item: str) -> int:
    if not re.fullmatch("[0-9]{1,3}", item) or int(item) > 255:
        raise ValueError("a number from 0 to 255 is expected")
    return int(item)


def _call(function: str, items: list[str], names: dict[str, int]) -> Statement:
    if function not in FUNCTIONS:
        raise ValueError("there is no function of that name")
    sequences, numbers, _ = FUNCTIONS[function]
    if len(items) != sequences + numbers:
        raise ValueError(f"{function} takes {sequences + numbers} arguments")
    if not names.keys() >= set(items[:sequences]):
        raise ValueError(f"{function} needs the name of an earlier statement")
    return Statement(function, tuple(names[item] for item in items[:sequences]), tuple(map(_byte, items[sequences:])))


def run(program: list[Statement]) -> Sequence:
    """Sequence of a program's last statement.

    Args:
        program: from ``parse``.

    Raises:
        ValueError: if a sequence becomes longer than ``MAX_LENGTH``, or a divisor or a step is zero.

    Example::

        >>> run(parse("a=up(5,3,1); b=tile(a,2)"))
        [5, 6, 7, 5, 6, 7]
    """
    return trace(program)[-1]


def trace(program: list[Statement]) -> list[Sequence]:
    """Sequences of all statements; each costs at most twice ``MAX_LENGTH`` steps, and there are at most 64.

    Raises:
        ValueError: as ``run``.
    """
    values: list[Sequence] = []
    for function, sequences, numbers in program:
        inputs: list[Any] = [*(values[index] for index in sequences), *numbers]
        value = list(numbers) if function == _LIST else FUNCTIONS[function].call(*inputs)
        if len(value) > MAX_LENGTH:
            raise ValueError(f"a sequence is longer than {MAX_LENGTH}")
        values.append(value)
    return values


def program_bits(program: list[Statement]) -> float:
    """Length of a program's code under a uniform prior [bits].

    A statement takes log2 of the number of functions, 8 bits for each byte (and for the length of a literal list), and
    log2(i) for each name when there are i earlier statements.

    Example::

        >>> round(program_bits(parse("a=up(5,3,1)")), 2)
        28.39
    """
    bits = 0.0
    for index, (function, sequences, numbers) in enumerate(program):
        bits += math.log2(len(FUNCTIONS) + 1) + 8 * (len(numbers) + (function == _LIST))
        bits += sum(math.log2(index) for _ in sequences)
    return bits


def without_unused(program: list[Statement]) -> list[Statement]:
    """The statements that the last one depends on.

    Example::

        >>> len(without_unused(parse("a=up(5,3,1); b=fill(0,9); c=tile(a,2)")))
        2
    """
    used = {len(program) - 1}
    for index in reversed(range(len(program))):
        if index in used:
            used.update(program[index].sequences)
    numbers = {old: new for new, old in enumerate(sorted(used))}
    return [
        Statement(s.function, tuple(numbers[index] for index in s.sequences), s.numbers)
        for index, s in enumerate(program)
        if index in used
    ]


def write(program: list[Statement]) -> str:
    r"""Text of a program of at most 26 statements, with names in alphabetical order.

    Example::

        >>> write(parse("x = up(5, 3, 1)\ny = tile(x, 2)"))
        'a=up(5,3,1)\nb=tile(a,2)'
    """
    lines = []
    for index, (function, sequences, numbers) in enumerate(program):
        items = ",".join([*(chr(ord("a") + i) for i in sequences), *map(str, numbers)])
        call = f"[{items}]" if function == _LIST else f"{function}({items})"
        lines.append(f"{chr(ord('a') + index)}={call}")
    return "\n".join(lines)
