"""Where in a response the answer stands."""

from typing import Literal

__all__ = ["MAX_ANSWER_CHARS", "AnswerFormat", "extract_answer", "request", "wrap_answer"]

AnswerFormat = Literal["plain", "tags", "boxed"]

MAX_ANSWER_CHARS = 4096
"""Answers with more characters are no answers, which bounds the work of every check."""

_OPEN, _CLOSE, _BOX = "<answer>", "</answer>", "\\boxed{"


def extract_answer(response: str, answer_format: AnswerFormat) -> str | None:
    r"""Find the answer in a response; what stands before ``</think>`` is left out.

    Args:
        response: of a model; anything.
        answer_format: plain takes all of the text, tags what is between the last ``<answer>`` and ``</answer>``, boxed
            what is in the last ``\\boxed{}``.

    Returns:
        The answer without blanks around it, or None if there is none in this format or it is longer than
        ``MAX_ANSWER_CHARS``.

    Example::

        >>> extract_answer("<think>1+1</think><answer> 2 </answer>", "tags")
        '2'
        >>> extract_answer("so it is 2", "boxed") is None
        True
    """
    text = response.rpartition("</think>")[2]
    answer: str | None = text
    if answer_format == "tags":
        end = text.rfind(_CLOSE)
        start = text.rfind(_OPEN, 0, max(end, 0))
        answer = text[start + len(_OPEN) : end] if start >= 0 else None
    elif answer_format == "boxed":
        start = text.rfind(_BOX)
        answer = _to_matching_brace(text[start + len(_BOX) :]) if start >= 0 else None
    if answer is None:
        return None
    answer = answer.strip()
    return answer if 0 < len(answer) <= MAX_ANSWER_CHARS else None


def wrap_answer(answer: str, answer_format: AnswerFormat) -> str:
    """Write an answer so that ``extract_answer`` finds it.

    Example::

        >>> wrap_answer("2", "tags")
        '<answer>2</answer>'
    """
    if answer_format == "tags":
        return f"{_OPEN}{answer}{_CLOSE}"
    return f"{_BOX}{answer}}}" if answer_format == "boxed" else answer


def request(answer_format: AnswerFormat) -> str:
    """Ask for the format, in English; nothing for plain answers."""
    if answer_format == "tags":
        return f"Think first, then write the answer alone between {_OPEN} and {_CLOSE}."
    return f"Think first, then write the answer alone in {_BOX}}}." if answer_format == "boxed" else ""


def _to_matching_brace(text: str) -> str | None:
    depth = 1
    for position, character in enumerate(text[: MAX_ANSWER_CHARS + 1]):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:position]
    return None
