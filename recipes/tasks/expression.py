"""Expressions of + - * / and parentheses: parsed without recursion, evaluated in exact fractions."""

import re
from fractions import Fraction
from typing import NamedTuple

__all__ = ["evaluate"]

_TOKEN = re.compile(r"(?:0|[1-9][0-9]{0,3})(?![0-9])|[-+*/()]")
_BOND = {"+": 1, "-": 1, "*": 2, "/": 2}


class _Node(NamedTuple):
    """A value and how it came about: terms with signs, or factors with exponents, in no order."""

    value: Fraction
    kind: str  # "+" of terms, "*" of factors, "" of a number alone
    parts: tuple[tuple[int, str], ...]

    def text(self) -> str:
        """Canonical text: parts with positive sign (or exponent) first, each sort in alphabetical order."""
        if not self.kind:
            return self.parts[0][1]
        straight = sorted(part for sign, part in self.parts if sign > 0)
        inverse = sorted(part for sign, part in self.parts if sign < 0)
        return self.kind.join(straight) + "".join(("-" if self.kind == "+" else "/") + part for part in inverse)

    def as_parts(self, kind: str) -> tuple[tuple[int, str], ...]:
        """Terms of this node, or factors: of its own, or itself alone."""
        return (
            self.parts if self.kind in ("", kind) else ((1, f"({self.text()})" if self.kind == "+" else self.text()),)
        )


def evaluate(text: str, most_numbers: int) -> tuple[Fraction, list[int], str]:
    """Evaluate an expression of natural numbers below 10000.

    The work is linear in the length of the text, and numbers stay below 10000^(2 most_numbers).

    Args:
        text: the expression; spaces are allowed, signs before numbers are not.
        most_numbers: how many numbers there may be.

    Returns:
        The value, the numbers in order, and a text that is the same for expressions that differ in order and grouping
        of terms and factors alone.

    Raises:
        ValueError: if the text is no such expression, or divides by zero.

    Example::

        >>> evaluate("2 * (7 - 4)", most_numbers=3)
        (Fraction(6, 1), [2, 7, 4], '(7-4)*2')
        >>> evaluate("(7-4)*2", most_numbers=3)[2]
        '(7-4)*2'
    """
    operands: list[_Node] = []
    operators: list[str] = []
    numbers: list[int] = []
    value_expected = True
    for token in _tokens(text):
        if value_expected != (token == "(" or token.isdigit()):
            raise ValueError(f"{token!r} is out of place")
        if token.isdigit():
            numbers.append(int(token))
            if len(numbers) > most_numbers:
                raise ValueError("too many numbers")
            operands.append(_Node(Fraction(int(token)), "", ((1, str(int(token))),)))
            value_expected = False
        elif token == "(":
            operators.append(token)
        elif token == ")":
            while operators and operators[-1] != "(":
                _reduce(operands, operators.pop())
            if not operators:
                raise ValueError("')' is out of place")
            operators.pop()
        else:
            while operators and operators[-1] != "(" and _BOND[operators[-1]] >= _BOND[token]:
                _reduce(operands, operators.pop())
            operators.append(token)
            value_expected = True
    if value_expected or "(" in operators:
        raise ValueError("the expression is not complete")
    while operators:
        _reduce(operands, operators.pop())
    return operands[0].value, numbers, operands[0].text()


def _tokens(text: str) -> list[str]:
    tokens, position = [], 0
    while position < len(text):
        if text[position] == " ":
            position += 1
            continue
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"{text[position]!r} is no part of an expression")
        tokens.append(match.group())
        position = match.end()
    return tokens


def _reduce(operands: list[_Node], operator: str) -> None:
    right, left = operands.pop(), operands.pop()
    kind = "+" if operator in "+-" else "*"
    if operator == "/" and right.value == 0:
        raise ValueError("a division by zero")
    value = {
        "+": lambda: left.value + right.value,
        "-": lambda: left.value - right.value,
        "*": lambda: left.value * right.value,
        "/": lambda: left.value / right.value,
    }[operator]()
    flip = 1 if operator in "+*" else -1
    parts = left.as_parts(kind) + tuple((sign * flip, part) for sign, part in right.as_parts(kind))
    operands.append(_Node(value, kind, parts))
