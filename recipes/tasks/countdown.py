"""Countdown: reach a target from given numbers."""

from fractions import Fraction
from random import Random

from litropy.recipes.tasks.expression import evaluate
from litropy.recipes.tasks.task import GeneratedTask, Spec, Verdict

__all__ = ["Countdown"]


class Countdown(GeneratedTask):
    """An expression of given numbers with a given value: ``3 7 25:54``, answer ``(25-7)*3``.

    Two answers are the same solution when one becomes the other by laws of arithmetic that only reorder or regroup:
    ``3*(25-7)`` and ``(25-7)*3`` are one, ``25*3-7*3`` would be another.

    Args:
        numbers: how many numbers are given, from 2 to 6.
        largest: largest number given, from 2 to 99; the smallest is 1.
        largest_target: largest target, at least 1.
        use_all: whether every number must be used; else each at most once.

    Raises:
        ValueError: if an option is out of its range.

    Example::

        >>> spec = {"numbers": [3, 7, 25], "target": 54, "use_all": True}
        >>> Countdown.check(spec, "(25-7)*3").answer == Countdown.check(spec, "3*(25-7)").answer
        True
        >>> Countdown.check(spec, "9**9**9**9").correct
        False
    """

    def __init__(self, numbers: int = 3, largest: int = 25, largest_target: int = 100, use_all: bool = True) -> None:
        if not 2 <= numbers <= 6:
            raise ValueError(f"`numbers` is {numbers}; it must be from 2 to 6.")
        if not 2 <= largest <= 99:
            raise ValueError(f"`largest` is {largest}; it must be from 2 to 99.")
        if largest_target < 1:
            raise ValueError(f"`largest_target` is {largest_target}; it must be at least 1.")
        self.numbers = numbers
        self.largest = largest
        self.largest_target = largest_target
        self.use_all = use_all

    def generate(self, random: Random) -> Spec:
        """Draw numbers, and a value that they reach; its expression is in the problem as ``known``."""
        while True:
            numbers = sorted(random.randint(1, self.largest) for _ in range(self.numbers))
            value, text = _combine(numbers, random)
            if value.denominator == 1 and 1 <= value <= self.largest_target:
                return {"numbers": numbers, "target": int(value), "use_all": self.use_all, "known": text}

    @staticmethod
    def prompt(spec: Spec) -> str:
        """The numbers, a colon, the target, and a line's end."""
        return f"{' '.join(map(str, spec['numbers']))}:{spec['target']}\n"

    @staticmethod
    def rules(spec: Spec) -> str:
        """What may be written, and how often each number is used."""
        times = "exactly once" if spec["use_all"] else "at most once"
        return (
            "Before the colon are numbers, after it a target. Write an expression that equals the target, with + - * /"
            f" and parentheses, and each number {times}."
        )

    @staticmethod
    def solve(spec: Spec, random: Random) -> str:
        """The expression that the problem was made from."""
        return spec["known"]

    @staticmethod
    def check(spec: Spec, answer: str) -> Verdict:
        """Evaluate with exact fractions."""
        try:
            value, used, canonical = evaluate(answer, most_numbers=len(spec["numbers"]))
        except ValueError as error:
            return Verdict.wrong(str(error))
        left = list(spec["numbers"])
        for number in used:
            if number not in left:
                return Verdict.wrong(f"the number {number} is not given, or used too often", canonical)
            left.remove(number)
        if left and spec["use_all"]:
            return Verdict.wrong("not every number is used", canonical)
        if value != spec["target"]:
            return Verdict.wrong(f"the value is {value}", canonical)
        return Verdict.right(canonical)


def _combine(numbers: list[int], random: Random) -> tuple[Fraction, str]:
    """Join two parts at random until one is left; divisions that leave a remainder become products."""
    # value, text, how tightly the text holds together
    parts = [(Fraction(number), str(number), 3) for number in numbers]
    random.shuffle(parts)
    while len(parts) > 1:
        (a, left, bond_a), (b, right, bond_b) = parts.pop(), parts.pop()
        sign = random.choice("+-*/")
        if sign == "/" and (b == 0 or (a / b).denominator != 1):
            sign = "*"
        if sign == "-" and a < b:
            a, left, bond_a, b, right, bond_b = b, right, bond_b, a, left, bond_a
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else a}[sign]
        bond = 1 if sign in "+-" else 2
        left = left if bond_a >= bond else f"({left})"
        right = right if bond_b > bond or (bond_b == bond and sign in "+*") else f"({right})"
        parts.insert(random.randrange(len(parts) + 1), (value, f"{left}{sign}{right}", bond))
    return parts[0][0], parts[0][1]
