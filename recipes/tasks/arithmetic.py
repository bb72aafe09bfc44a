"""Arithmetic with one right answer, and sums to a target, which have many."""

import operator
import re
from random import Random
from typing import Literal

from litropy.recipes.tasks.task import GeneratedTask, Spec, Verdict

__all__ = ["Arithmetic", "SumToTarget"]

_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


class Arithmetic(GeneratedTask):
    """Sums, differences or products of two numbers: ``12+34=``, answer ``46``.

    Args:
        digits: digits of the larger operand at most, from 1 to 9.
        operations: which operations to draw from.
        padded: write operands and values with leading zeros, as wide as the widest: ``05+34=``, answer ``039``. A digit
            then always stands in the same place, which a small model learns much faster.

    Raises:
        ValueError: if there are no operations, or ``digits`` is out of its range.

    Example::

        >>> task = Arithmetic(digits=2)
        >>> task.prompt({"left": 12, "operation": "+", "right": 34})
        '12+34='
        >>> task.check({"left": 12, "operation": "+", "right": 34}, "46").correct
        True
    """

    def __init__(
        self, digits: int = 2, operations: list[Literal["+", "-", "*"]] | None = None, padded: bool = False
    ) -> None:
        if not 1 <= digits <= 9:
            raise ValueError(f"`digits` is {digits}; it must be from 1 to 9.")
        self.digits = digits
        self.operations = ["+"] if operations is None else list(operations)
        unknown = [name for name in self.operations if name not in _OPERATIONS]
        if unknown or not self.operations:
            raise ValueError(f"`operations` is {self.operations}; give one or several of {list(_OPERATIONS)}.")
        self.padded = padded

    def generate(self, random: Random) -> Spec:
        """Draw both operands from 0 to 10^digits - 1."""
        left, right = random.randrange(10**self.digits), random.randrange(10**self.digits)
        spec: Spec = {"left": left, "operation": random.choice(self.operations), "right": right}
        return spec | {"digits": self.digits} if self.padded else spec

    @staticmethod
    def prompt(spec: Spec) -> str:
        """The expression and an equals sign."""
        left, right = (str(spec[side]).zfill(spec.get("digits", 0)) for side in ("left", "right"))
        return f"{left}{spec['operation']}{right}="

    @staticmethod
    def rules(spec: Spec) -> str:
        """To work it out, and how wide the answer is."""
        rule = "Work out the value of the expression. The answer is an integer."
        return f"{rule[:-1]} of {_width(spec)} characters, with leading zeros." if _width(spec) else rule

    @staticmethod
    def solve(spec: Spec, random: Random) -> str:
        """The value."""
        return _value(spec)

    @staticmethod
    def check(spec: Spec, answer: str) -> Verdict:
        """Compare with the value, written without leading zeros, or as wide as it is padded to.

        A padded answer's progress is the share of its characters that are right.
        """
        value = _value(spec)
        form = "-?[0-9]{1,20}" if "digits" in spec else "0|-?[1-9][0-9]{0,19}"
        if not re.fullmatch(form, answer):
            return Verdict.wrong("no integer")
        if answer == value:
            return Verdict.right(value)
        right = sum(map(operator.eq, answer, value)) if "digits" in spec and len(answer) == len(value) else 0
        return Verdict.wrong("another number", answer, right / len(value))


def _width(spec: Spec) -> int:
    """Characters of a padded answer, 0 for others."""
    if "digits" not in spec:
        return 0
    return 2 * spec["digits"] if spec["operation"] == "*" else spec["digits"] + 1


def _value(spec: Spec) -> str:
    """The value as it is to be written."""
    return str(_OPERATIONS[spec["operation"]](spec["left"], spec["right"])).zfill(_width(spec))


class SumToTarget(GeneratedTask):
    """Numbers that sum to a target: ``9=``, answer ``4+5``; the order counts, so there are many solutions.

    With ``terms`` 2 and ``largest`` 9 there are 19 problems, with 1 to 10 solutions each.

    Args:
        terms: how many numbers, from 2 to 9.
        largest: largest number allowed, from 1 to 999; the smallest is 0.

    Raises:
        ValueError: if an option is out of its range.

    Example::

        >>> SumToTarget.check({"target": 9, "terms": 2, "largest": 9}, "4+5").answer
        '4+5'
        >>> SumToTarget.check({"target": 9, "terms": 2, "largest": 9}, "4+6").reason
        'the sum is 10'
    """

    def __init__(self, terms: int = 2, largest: int = 9) -> None:
        if not 2 <= terms <= 9:
            raise ValueError(f"`terms` is {terms}; it must be from 2 to 9.")
        if not 1 <= largest <= 999:
            raise ValueError(f"`largest` is {largest}; it must be from 1 to 999.")
        self.terms = terms
        self.largest = largest

    def generate(self, random: Random) -> Spec:
        """Draw a target from all that can be reached."""
        return {"target": random.randint(0, self.terms * self.largest), "terms": self.terms, "largest": self.largest}

    @staticmethod
    def prompt(spec: Spec) -> str:
        """The target and an equals sign."""
        return f"{spec['target']}="

    @staticmethod
    def rules(spec: Spec) -> str:
        """How many numbers, and from which range."""
        return (
            f"Write {spec['terms']} integers from 0 to {spec['largest']}, joined by +, whose sum is the number before"
            " the equals sign."
        )

    @staticmethod
    def solve(spec: Spec, random: Random) -> str:
        """A solution at random; with two terms, each is as likely as any other."""
        left, numbers = spec["target"], []
        for others in reversed(range(spec["terms"])):
            number = random.randint(max(0, left - others * spec["largest"]), min(spec["largest"], left))
            numbers.append(number)
            left -= number
        return "+".join(map(str, numbers))

    @staticmethod
    def check(spec: Spec, answer: str) -> Verdict:
        """Add up."""
        terms = answer.split("+")
        if not all(re.fullmatch("0|[1-9][0-9]{0,3}", term) for term in terms):
            return Verdict.wrong("not numbers joined by +")
        if len(terms) != spec["terms"]:
            return Verdict.wrong(f"{len(terms)} numbers", answer)
        numbers = [int(term) for term in terms]
        if max(numbers) > spec["largest"]:
            return Verdict.wrong("a number is too large", answer)
        if sum(numbers) != spec["target"]:
            return Verdict.wrong(f"the sum is {sum(numbers)}", answer)
        return Verdict.right(answer)
