"""What a task and a policy tell each other: prompts with what checks them, and checked responses."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

__all__ = ["Reward", "RewardResult", "Sample"]


class Sample(NamedTuple):
    """A prompt, and what its checker needs; a batch of a task's data module is a list of these.

    Attributes:
        prompt: text that the policy continues, chat markup included if there is any.
        spec: what the checker needs (a right answer, a target, a start state): plain JSON.
        task: name of the task, which chooses the checker.
        sample_id: number of the prompt within its data, the same in every run.
        solution: a right response, for the supervised warm start; None if none is known.
    """

    prompt: str
    spec: Any
    task: str
    sample_id: int
    solution: str | None = None


class RewardResult(NamedTuple):
    """What a checker found.

    Attributes:
        value: the reward.
        correct: whether the response solves the task.
        answer: what was answered, right or wrong, in a form in which equal answers are equal strings: it counts the
            votes of maj@k and the distinct solutions; None if there is no answer in the expected format.
    """

    value: float
    correct: bool
    answer: str | None = None


class Reward(ABC):
    """Checks responses; a user's own is a subclass, named in a config by its ``class_path``."""

    @abstractmethod
    def __call__(self, samples: list[Sample], responses: list[str]) -> list[RewardResult]:
        """Judge one response a sample, in order.

        Args:
            samples: the prompts; one that was answered several times comes several times.
            responses: decoded text, without special tokens; may be empty, and is never to be trusted.
        """
