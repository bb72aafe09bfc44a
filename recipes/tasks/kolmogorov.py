"""The KoLMogorov Test: write a short program for a sequence of bytes."""

import gzip
from random import Random

from litropy.recipes.tasks.sequence_language import (
    FUNCTIONS,
    Statement,
    parse,
    program_bits,
    run,
    trace,
    without_unused,
    write,
)
from litropy.recipes.tasks.task import GeneratedTask, Spec, Verdict

__all__ = ["KolmogorovTest"]

_MOST_NAMED = 26


class KolmogorovTest(GeneratedTask):
    r"""Compress a sequence into a program: ``5 6 7 5 6 7 5 6 7``, answer ``a=up(5,3,1)`` and ``b=tile(a,3)``.

    An answer is correct if the program makes the sequence and is shorter than the sequence itself: with the bits of
    ``program_bits``, quality = 1 - bits / min(8 n, 8 |gzip|) > 0. A literal list is never shorter.

    Args:
        min_statements: fewest statements of the programs that problems are made from, at least 1.
        max_statements: most statements, at most 8.
        min_length: shortest sequence, at least 4.
        max_length: longest sequence, at most 256.

    Raises:
        ValueError: if an option is out of its range.

    Example::

        >>> spec = {"sequence": [5, 6, 7] * 5}
        >>> round(KolmogorovTest.check(spec, "a=up(5,3,1)\nb=tile(a,5)").quality, 2)
        0.66
        >>> KolmogorovTest.check(spec, f"a={[5, 6, 7] * 5}").reason
        'the program is no shorter than the sequence'

    Reference:
        Yoran et al., "The KoLMogorov Test: Compression by Code Generation", ICLR 2025; the language is our own.
    """

    def __init__(
        self, min_statements: int = 1, max_statements: int = 3, min_length: int = 8, max_length: int = 32
    ) -> None:
        if not 1 <= min_statements <= max_statements <= 8:
            raise ValueError(
                f"`min_statements` and `max_statements` are {min_statements} and {max_statements}; they must be from 1"
                " to 8."
            )
        if not 4 <= min_length <= max_length <= 256:
            raise ValueError(
                f"`min_length` and `max_length` are {min_length} and {max_length}; they must be from 4 to 256."
            )
        self.statements = (min_statements, max_statements)
        self.length = (min_length, max_length)

    def generate(self, random: Random) -> Spec:
        """Draw programs until one makes a longer sequence than itself; it is in the problem as ``known``."""
        while True:
            program = _draw(random.randint(*self.statements), self.length[1], random)
            try:
                values = trace(program)
            except ValueError:
                continue
            sequence, short = values[-1], without_unused(program)
            if len(short) < self.statements[0] or not self.length[0] <= len(sequence) <= self.length[1]:
                continue
            idle = any(values[i] == values[j] for i, statement in enumerate(program) for j in statement.sequences)
            if not idle and _quality(short, sequence) > 0:
                return {"sequence": sequence, "known": write(short)}

    @staticmethod
    def prompt(spec: Spec) -> str:
        """The sequence, and a line's end."""
        return f"{' '.join(map(str, spec['sequence']))}\n"

    @staticmethod
    def rules(spec: Spec) -> str:
        """The language."""
        calls = ", ".join(
            f"{name}({', '.join([*'xy'[: f.sequences], *'kmn'[: f.numbers]])})" for name, f in FUNCTIONS.items()
        )
        return (
            "Write a program, as short as you can, whose last line makes this sequence. A line is name=function(...)"
            " or name=[numbers], with a letter as name; x and y are names of earlier lines, k, m and n numbers from 0"
            f" to 255: {calls}. up and down count from k, m times, by n; fill is value and count; replace is old and"
            " new; arithmetic is modulo 256."
        )

    @staticmethod
    def solve(spec: Spec, random: Random) -> str:
        """The program that the problem was made from."""
        return spec["known"]

    @staticmethod
    def check(spec: Spec, answer: str) -> Verdict:
        """Run the program; canonical is without statements that nothing depends on."""
        try:
            program = parse(answer)
        except ValueError as error:
            return Verdict.wrong(str(error))
        used = without_unused(program)
        canonical = write(used) if len(used) <= _MOST_NAMED else answer
        try:
            sequence = run(program)
        except ValueError as error:
            return Verdict.wrong(str(error), canonical)
        if sequence != spec["sequence"]:
            return Verdict.wrong("another sequence", canonical, _common(sequence, spec["sequence"]))
        quality = _quality(program, sequence)
        if quality <= 0:
            return Verdict.wrong("the program is no shorter than the sequence", canonical, 1.0)
        return Verdict.right(canonical, quality)


def _quality(program: list[Statement], sequence: list[int]) -> float:
    return 1 - program_bits(program) / (8 * min(len(sequence), len(gzip.compress(bytes(sequence), mtime=0))))


def _common(made: list[int], wanted: list[int]) -> float:
    same = next((i for i, (a, b) in enumerate(zip(made, wanted, strict=False)) if a != b), min(len(made), len(wanted)))
    return same / len(wanted)


def _draw(statements: int, longest: int, random: Random) -> list[Statement]:
    """A random program; later statements prefer what no other has read."""
    program: list[Statement] = []
    unread: list[int] = []
    for index in range(statements):
        left = statements - index
        options = [name for name, f in FUNCTIONS.items() if f.sequences <= min(index, 1 + (len(unread) > 1))]
        if index and len(unread) >= left:  # time to join what there is
            options = [name for name in options if FUNCTIONS[name].sequences == min(2, len(unread))]
        function = random.choice(options)
        chosen = tuple(
            unread.pop(random.randrange(len(unread))) if unread else random.randrange(index)
            for _ in range(FUNCTIONS[function].sequences)
        )
        program.append(Statement(function, chosen, _numbers(function, longest, random)))
        unread.append(index)
    return program


def _numbers(function: str, longest: int, random: Random) -> tuple[int, ...]:
    if function in ("up", "down"):
        return random.randrange(256), random.randint(3, min(255, longest)), random.randint(1, 9)
    if function == "fill":
        return random.randrange(256), random.randint(3, min(255, longest))
    if function in ("tile", "every"):
        return (random.randint(2, 5),)
    if function == "slice":
        start = random.randint(0, longest // 2)
        return start, min(255, start + random.randint(3, longest))
    return tuple(random.randint(1, 255) for _ in range(FUNCTIONS[function].numbers))
