"""Compare mathematical answers by math-verify; runs by itself in a worker process."""

from functools import lru_cache
from typing import Any

__all__ = ["equal_answers", "prepare"]


def equal_answers(gold: str, answer: str) -> bool:
    """Whether two answers, in LaTeX or plain, mean the same.

    Args:
        gold: the right answer.
        answer: of a model.

    Raises:
        LookupError: if the right answer cannot be read.
    """
    from math_verify import verify

    wanted = _parse(gold)
    if not wanted:
        raise LookupError("the right answer cannot be read")
    # its own time limits are signals, which the process's own replaces
    return bool(verify(wanted, _parse(answer), timeout_seconds=None))


def prepare() -> None:
    """Import what the first job needs."""
    equal_answers("1", "\\frac{2}{2}")


@lru_cache(maxsize=64)  # a group of responses has the same right answer
def _parse(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    # one expression and nothing else: in free text it would find a number somewhere
    boxed = rf"\boxed{{{text.strip().rstrip('.')}}}"
    return parse(boxed, extraction_config=(LatexExtractionConfig(),), parsing_timeout=None)
