"""Rewards that depend on the text alone."""

import math
from typing import Any

from litropy.recipes.rlvr_samples import Reward, RewardResult, Sample
from litropy.recipes.tasks.answer_format import extract_answer
from litropy.recipes.tasks.task import Limits, Verdict, task_class

__all__ = ["Correctness", "Format", "RewardSum", "SoftOverlong", "judge"]


def judge(samples: list[Sample], responses: list[str], limits: Limits) -> list[Verdict]:
    """Judge responses, each by the check of its sample's task.

    Args:
        samples: of ``TaskDataModule``.
        responses: one a sample.
        limits: of checks in other processes.

    Raises:
        ValueError: if a right answer cannot be read.
    """
    verdicts = [Verdict.wrong("no answer in the expected format")] * len(samples)
    answered: dict[str, list[tuple[int, str]]] = {}
    for index, (sample, response) in enumerate(zip(samples, responses, strict=True)):
        answer = extract_answer(response, sample.spec["answer_format"])
        if answer is not None:
            answered.setdefault(sample.task, []).append((index, answer))
    for key, found in answered.items():
        specs = [samples[index].spec for index, _ in found]
        checked = task_class(key).check_many(specs, [answer for _, answer in found], limits)
        for (index, _), verdict in zip(found, checked, strict=True):
            verdicts[index] = verdict
    return verdicts


class Correctness(Reward):
    """1 for a correct answer, else 0; or by degrees.

    value = 1 - quality (1 - q) for a correct answer of quality q; progress p for a wrong one that went as far as p.

    Args:
        quality: how much of the reward depends on quality, from 0 to 1: in puzzles the least number of moves over the
            number taken, in the KoLMogorov Test the share of bits saved.
        progress: reward for a wrong answer's progress, at least 0 and below 1: share of legal moves before the first
            illegal one, or of the sequence or of a padded number's digits that is right.
        processes: how many processes compare mathematical answers.
        seconds: most processor time [s] to compare one; what takes longer is wrong.
        memory_mib: most memory [MiB] to compare one.

    Raises:
        ValueError: if an option is out of its range.
    """

    def __init__(
        self,
        quality: float = 0.0,
        progress: float = 0.0,
        processes: int = 2,
        seconds: float = 3.0,
        memory_mib: int = 1024,
    ) -> None:
        if not 0 <= quality <= 1:
            raise ValueError(f"`quality` is {quality}; it must be from 0 to 1.")
        if not 0 <= progress < 1:
            raise ValueError(f"`progress` is {progress}; it must be at least 0 and below 1.")
        if processes < 1 or seconds <= 0 or memory_mib < 1:
            raise ValueError(
                f"`processes`, `seconds` and `memory_mib` are {processes}, {seconds} and {memory_mib}; they must be"
                " above 0."
            )
        self.quality = quality
        self.progress = progress
        self.limits = Limits(processes, seconds, memory_mib)

    def __call__(self, samples: list[Sample], responses: list[str]) -> list[RewardResult]:
        """Judge by the samples' tasks."""
        return [
            RewardResult(self._value(verdict), verdict.correct, verdict.answer)
            for verdict in judge(samples, responses, self.limits)
        ]

    def _value(self, verdict: Verdict) -> float:
        if verdict.correct:
            return 1 - self.quality * (1 - verdict.quality)
        return self.progress * verdict.progress


class Format(Reward):
    """1 for a response that has an answer where the answer format says, else 0; for ``RewardSum``."""

    def __call__(self, samples: list[Sample], responses: list[str]) -> list[RewardResult]:
        """Look for answers, right or wrong."""
        answers = [
            extract_answer(response, sample.spec["answer_format"])
            for sample, response in zip(samples, responses, strict=True)
        ]
        return [RewardResult(float(answer is not None), False, answer) for answer in answers]


class SoftOverlong(Reward):
    """Soft overlong punishment of DAPO, for ``RewardSum``.

    With length L in tokens: 0 up to longest - buffer, then (longest - buffer - L) / buffer, and -1 from longest on.

    Args:
        longest: length [tokens] with the full punishment, usually that at which generation stops.
        buffer: how many tokens before that it begins, from 1 to ``longest``.

    Raises:
        ValueError: if ``buffer`` is out of its range.

    Example::

        >>> overlong = SoftOverlong(longest=10, buffer=4)
        >>> [overlong.punishment(length) for length in (6, 8, 12)]
        [0.0, -0.5, -1.0]

    Reference:
        Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", equation 13.
    """

    tokenizer: Any = None
    """Set by ``TaskDataModule``; without one, characters count."""

    def __init__(self, longest: int, buffer: int) -> None:
        if not 1 <= buffer <= longest:
            raise ValueError(f"`buffer` is {buffer}; it must be from 1 to `longest` ({longest}).")
        self.longest = longest
        self.buffer = buffer

    def __call__(self, samples: list[Sample], responses: list[str]) -> list[RewardResult]:
        """Tokenize again, and punish."""
        return [RewardResult(self.punishment(self._length(response)), False) for response in responses]

    def punishment(self, length: int) -> float:
        """Reward, from -1 to 0, for a length [tokens]."""
        return min(0.0, max(-1.0, (self.longest - self.buffer - length) / self.buffer))

    def _length(self, response: str) -> int:
        if self.tokenizer is None:
            return len(response)
        return len(self.tokenizer(response, add_special_tokens=False)["input_ids"])


class RewardSum(Reward):
    """Weighted sum of rewards; whether an answer is correct, and what it is, says the first.

    Args:
        rewards: what to add up.
        weights: one for each; None takes 1.

    Raises:
        ValueError: if there are no rewards, or not as many weights.

    Example::

        >>> from litropy.recipes.rlvr_samples import Sample
        >>> from litropy.recipes.tasks import Arithmetic, Correctness, Format, task_key
        >>> spec = {"left": 1, "operation": "+", "right": 2, "answer_format": "plain"}
        >>> sample = Sample("1+2=", spec, task_key(Arithmetic), 0)
        >>> RewardSum([Correctness(), Format()], [1.0, 0.25])([sample] * 3, ["3", "4", ""])[1]
        RewardResult(value=0.25, correct=False, answer='4')
    """

    def __init__(self, rewards: list[Reward], weights: list[float] | None = None) -> None:
        self.rewards = list(rewards)
        self.weights = [1.0] * len(self.rewards) if weights is None else list(weights)
        if not self.rewards or len(self.weights) != len(self.rewards):
            raise ValueError(
                f"There are {len(self.rewards)} `rewards` and {len(self.weights)} `weights`; give at least one reward,"
                " and a weight for each."
            )
        if not all(map(math.isfinite, self.weights)):
            raise ValueError(f"`weights` are {self.weights}; they must be finite.")

    def __call__(self, samples: list[Sample], responses: list[str]) -> list[RewardResult]:
        """Ask every reward, and add up."""
        columns = [reward(samples, responses) for reward in self.rewards]
        return [
            row[0]._replace(value=sum(w * result.value for w, result in zip(self.weights, row, strict=True)))
            for row in zip(*columns, strict=True)
        ]
