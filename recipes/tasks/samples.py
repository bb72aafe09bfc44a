"""Problems as samples: which are for training and which for validation, and what a model gets to read."""

import hashlib
from collections.abc import Sequence
from random import Random
from typing import Any, Protocol

from litropy.recipes.rlvr_samples import Sample
from litropy.recipes.tasks.answer_format import AnswerFormat, request
from litropy.recipes.tasks.math_problem import MathProblem
from litropy.recipes.tasks.task import GeneratedTask, Spec, Task, task_key

__all__ = ["GeneratedProblems", "GivenProblems", "Problems", "held_out", "to_sample"]

_MOST_DRAWS = 1000

Problem = tuple[type[Task], Spec]


class Problems(Protocol):
    """Problems by their number."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, index: int) -> Problem:
        """One of them."""
        ...


def held_out(name: str, fraction: float, seed: int) -> bool:
    """Whether a problem is for validation, which its name and the seed decide alone.

    Args:
        name: of the problem; the same problem always has the same.
        fraction: share of the problems that is held out.
        seed: another one holds out others.

    Example::

        >>> 150 < sum(held_out(f"{number}+1=", fraction=0.2, seed=0) for number in range(1000)) < 250
        True
    """
    digest = hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


class GeneratedProblems:
    """Problems drawn from a seed; the same number is the same problem, in every run.

    Args:
        tasks: whose problems to draw, each as often.
        seed: of the problems.
        val: draw problems for validation, none of which comes up in training.
        val_fraction: share of all possible problems that is held out; 0 validates on what is trained on.
        size: how many problems; for validation, different ones, and fewer where there are fewer.

    Raises:
        ValueError: if a task has so few problems that none was found.
    """

    def __init__(self, tasks: Sequence[GeneratedTask], seed: int, val: bool, val_fraction: float, size: int) -> None:
        self.tasks = tasks
        self.seed = seed
        self.val = val
        self.val_fraction = val_fraction
        self.size = size
        self._different = self._find_different() if val else None

    def __len__(self) -> int:
        return self.size if self._different is None else len(self._different)

    def __getitem__(self, index: int) -> Problem:
        return self._draw(index) if self._different is None else self._different[index]

    def _draw(self, index: int) -> Problem:
        random = Random(f"{self.seed} {'val' if self.val else 'train'} {index}")
        task = self.tasks[index % len(self.tasks)]
        kind = type(task)
        for _ in range(_MOST_DRAWS):
            spec = task.generate(random)
            name = f"{task_key(kind)} {kind.prompt(spec)}"
            if not self.val_fraction or held_out(name, self.val_fraction, self.seed) == self.val:
                return kind, spec
        raise ValueError(
            f"{kind.__name__} has too few problems: {_MOST_DRAWS} draws gave none for"
            f" {'validation' if self.val else 'training'}. Allow larger problems, change `val_fraction`"
            f" ({self.val_fraction}) or `seed`, or set `val_fraction: 0` to validate on what is trained on."
        )

    def _find_different(self) -> list[Problem]:
        found: dict[str, Problem] = {}
        for index in range(8 * self.size):
            kind, spec = self._draw(index)
            found.setdefault(f"{task_key(kind)} {kind.prompt(spec)}", (kind, spec))
            if len(found) == self.size:
                break
        return list(found.values())


class GivenProblems:
    """Problems of the user's."""

    def __init__(self, specs: Sequence[Spec]) -> None:
        self.specs = specs

    def __len__(self) -> int:
        return len(self.specs)

    def __getitem__(self, index: int) -> Problem:
        return MathProblem, self.specs[index]


def to_sample(problem: Problem, index: int, seed: int, answer_format: AnswerFormat, chat: Any = None) -> Sample:
    """Write a problem down.

    Args:
        problem: task and spec.
        index: number of the problem.
        seed: of the solution, where there are several.
        answer_format: plain prompts are as short as they can be, others explain the rules and ask for the format.
        chat: tokenizer whose chat template goes around the prompt; None leaves it as it is.

    Example::

        >>> from litropy.recipes.tasks import Arithmetic
        >>> to_sample((Arithmetic, {"left": 1, "operation": "+", "right": 2}), 0, 0, "plain").prompt
        '1+2='
    """
    kind, spec = problem
    prompt = kind.prompt(spec)
    if answer_format != "plain":
        parts = [kind.rules(spec), prompt.rstrip("\n"), request(answer_format)]
        prompt = "\n\n".join(part for part in parts if part) + "\n"
    if chat is not None:
        message = [{"role": "user", "content": prompt.rstrip("\n")}]
        prompt = chat.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    known = spec.get("answer", "") is not None  # None: checked by a reward of the user's
    solution = kind.response(spec, answer_format, Random(f"{seed} solution {index}")) if known else None
    return Sample(prompt, {**spec, "answer_format": answer_format}, task_key(kind), index, solution)
