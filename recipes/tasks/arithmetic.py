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

    Raises:
        ValueError: if there are no operations, or ``digits`` is out of its range.

    Example::

        >>> task = Arithmetic(digits=2)
        >>> task.prompt({"left": 12, "operation": "+", "right": 34})
        '12+34='
        >>> task.check({"left": 12, "operation": "+", "right": 34}, "46").correct
        True
    """

    def __init__(self, digits: int = 2, operations: list[Literal["+", "-", "*"]] | None = None) -> None:
        if not 1 <= digits <= 9:
            raise ValueError(f"`digits` is {digits}; it must be from 1 to 9.")
        self.digits = digits
        self.operations = ["+"] if operations is None else list(operations)
        unknown = [name for name in self.operations if name not in _OPERATIONS]
        if unknown or not self.operations:
            raise ValueError(f"`operations` is {self.operations}; give one or several of {list(_OPERATIONS)}.")

    def generate(self, random: Random) -> Spec:
        """Draw both operands from 0 to 10^digits - 1."""
        left, right = random.randrange(10**self.digits), random.randrange(10**self.digits)
        return {"left": left, "operation": random.choice(self.operations), "right": right}

    @staticmethod
    def prompt(spec: Spec) -> str:
        """The expression and an equals sign."""
        return f"{spec['left']}{spec['operation']}{spec['right']}="

    @staticmethod
    def rules(spec: Spec) -> str:
        """To work it out."""
        return "Work out the value of the expression. The answer is an integer."

    @staticmethod
    def solve(spec: Spec, random: Random) -> str:
        """The value."""
        return str(_OPERATIONS[spec["operation"]](spec["left"], spec["right"]))

    @staticmethod
    def check(spec: Spec, answer: str) -> Verdict:
        """Compare with the value, written without leading zeros."""
        value = str(_OPERATIONS[spec["operation"]](spec["left"], spec["right"]))
        if not re.fullmatch("0|-?[1-9][0-9]{0,19}", answer):
            return Verdict.wrong("no integer")
        return Verdict.right(value) if answer == value else Verdict.wrong("another number", answer)


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
