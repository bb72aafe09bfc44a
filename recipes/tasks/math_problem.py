"""The user's own problems, whose answers math-verify compares with the right ones."""

from functools import lru_cache
from importlib.util import find_spec
from random import Random

from litropy.recipes.tasks.answer_format import AnswerFormat, extract_answer, wrap_answer
from litropy.recipes.tasks.math_answers import equal_answers
from litropy.recipes.tasks.task import Limits, Spec, Task, Verdict
from litropy.recipes.tasks.worker_pool import Failure, WorkerPool

__all__ = ["MathProblem"]

_MOST_CHARS = 512


class MathProblem(Task):
    r"""A question with a right answer: a number, or mathematics in LaTeX.

    Answers that mean the same are correct (1/2, 0.5 and ``\frac{1}{2}``). The comparison runs in processes of its own,
    within limits of time and memory; what exceeds them, or 512 characters, is wrong.
    """

    @staticmethod
    def prompt(spec: Spec) -> str:
        """The question, and a line's end."""
        return f"{spec['question']}\n"

    @staticmethod
    def rules(spec: Spec) -> str:
        """None: the question has to say it all."""
        return ""

    @staticmethod
    def solve(spec: Spec, random: Random) -> str:
        """The right answer."""
        return spec["answer"]

    @classmethod
    def response(cls, spec: Spec, answer_format: AnswerFormat, random: Random) -> str:
        """The way to the answer, where it is known, and the answer."""
        worked, answer = spec["worked"], spec["answer"]
        if not worked or answer_format == "plain":
            return wrap_answer(answer, answer_format)
        if extract_answer(worked, answer_format) == answer:
            return worked
        return f"{worked}\n{wrap_answer(answer, answer_format)}"

    @classmethod
    def check(cls, spec: Spec, answer: str) -> Verdict:
        """Compare with the right answer."""
        return cls.check_many([spec], [answer], Limits())[0]

    @classmethod
    def check_many(cls, specs: list[Spec], answers: list[str], limits: Limits) -> list[Verdict]:
        """Compare each different answer once; equal texts need no comparison.

        Raises:
            ValueError: if a right answer cannot be read, or math-verify is not installed.
        """
        pairs = [(spec["answer"], answer) for spec, answer in zip(specs, answers, strict=True)]
        unequal = {pair for pair in pairs if pair[0] != pair[1] and max(map(len, pair)) <= _MOST_CHARS}
        jobs = sorted(unequal)
        results = dict(zip(jobs, _pool(limits).map(jobs), strict=True)) if jobs else {}
        for (gold, _), result in results.items():
            if result == Failure("LookupError"):
                raise ValueError(f"The right answer {gold!r} is no number and no mathematics that can be read.")
        return [_verdict(gold, answer, results.get((gold, answer), gold == answer)) for gold, answer in pairs]


def _verdict(gold: str, answer: str, result: bool | Failure) -> Verdict:
    if isinstance(result, Failure):
        return Verdict.wrong(result.reason, answer)
    return Verdict.right(gold) if result else Verdict.wrong("another answer", answer)


@lru_cache(maxsize=4)
def _pool(limits: Limits) -> WorkerPool:
    if find_spec("math_verify") is None:
        raise ValueError("To compare mathematical answers, install math-verify: `pip install 'litropy[math]'`.")
    return WorkerPool(equal_answers, limits.processes, limits.seconds, limits.memory_mib)
