"""What a verifiable task is: a prompt, a solution, and a check that no answer can hurt."""

import importlib
from abc import ABC, abstractmethod
from random import Random
from typing import Any, NamedTuple

from litropy.recipes.tasks.answer_format import AnswerFormat, wrap_answer

__all__ = ["GeneratedTask", "Limits", "Spec", "Task", "Verdict", "task_class", "task_key"]

Spec = dict[str, Any]


class Verdict(NamedTuple):
    """What a check says about an answer.

    Attributes:
        correct: whether the answer solves the problem.
        answer: canonical form of the answer, right or wrong: equal strings are the same answer; None if it is not in
            the form that the rules ask for.
        quality: how good a correct answer is, in (0, 1], such as the optimal number of moves over the number taken.
        progress: how far a wrong answer went, in [0, 1], such as its share of legal moves.
        reason: why the answer is wrong; empty for a correct one.
    """

    correct: bool
    answer: str | None = None
    quality: float = 0.0
    progress: float = 0.0
    reason: str = ""

    @classmethod
    def right(cls, answer: str, quality: float = 1.0) -> "Verdict":
        """Verdict on a correct answer."""
        return cls(True, answer, quality, 1.0)

    @classmethod
    def wrong(cls, reason: str, answer: str | None = None, progress: float = 0.0) -> "Verdict":
        """Verdict on a wrong answer."""
        return cls(False, answer, 0.0, progress, reason)


class Limits(NamedTuple):
    """What checks in processes of their own may take.

    Attributes:
        processes: how many check at the same time.
        seconds: most processor time [s] for one answer.
        memory_mib: memory [MiB] for one answer.
    """

    processes: int = 2
    seconds: float = 3.0
    memory_mib: int = 1024


class Task(ABC):
    """A kind of problem with checkable answers.

    A problem is a ``spec`` of JSON values, which holds all that its prompt, its solution and its check need.
    """

    @staticmethod
    @abstractmethod
    def prompt(spec: Spec) -> str:
        """The problem in few characters; equal prompts are the same problem."""

    @staticmethod
    @abstractmethod
    def rules(spec: Spec) -> str:
        """What one must know to read the prompt and to write an answer, in English."""

    @staticmethod
    @abstractmethod
    def solve(spec: Spec, random: Random) -> str:
        """An answer that is correct; one of several at random, where that is cheap."""

    @staticmethod
    @abstractmethod
    def check(spec: Spec, answer: str) -> Verdict:
        """Judge an answer of at most ``MAX_ANSWER_CHARS`` characters, in bounded time, whatever is in it."""

    @classmethod
    def check_many(cls, specs: list[Spec], answers: list[str], limits: Limits) -> list[Verdict]:
        """Judge many; a task whose checks run in other processes overrides this, and keeps to the limits."""
        return [cls.check(spec, answer) for spec, answer in zip(specs, answers, strict=True)]

    @classmethod
    def response(cls, spec: Spec, answer_format: AnswerFormat, random: Random) -> str:
        """A right response, with its answer where the format says."""
        return wrap_answer(cls.solve(spec, random), answer_format)


class GeneratedTask(Task):
    """A family of problems from a random generator; configured by ``class_path`` and ``init_args``."""

    @abstractmethod
    def generate(self, random: Random) -> Spec:
        """Draw a problem."""


def task_key(task: type[Task]) -> str:
    """Name by which samples refer to a task: dotted path of its class."""
    return f"{task.__module__}.{task.__qualname__}"


def task_class(key: str) -> type[Task]:
    """Task with this dotted path.

    Args:
        key: from ``task_key``.

    Raises:
        ValueError: if there is none.
    """
    module, _, name = key.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"There is no task {key!r}; a task is named by the dotted path of its class.") from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ValueError(f"{key!r} is no subclass of litropy.recipes.tasks.Task.")
    return found
