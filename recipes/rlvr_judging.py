"""Rewards of responses, with bad ones named; and what the answers to one prompt amount to."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from litropy.recipes.rlvr_samples import Reward, RewardResult, Sample

__all__ = ["InvalidReward", "distinct_correct_at_k", "judge", "majority_at_k", "pass_at_k"]

InvalidReward = Literal["stop", "wrong"]
_SHOWN = 200


def judge(
    reward: Reward, samples: list[Sample], responses: list[str], invalid: InvalidReward = "stop"
) -> list[RewardResult]:
    """Judge responses, one a sample.

    Args:
        reward: the checker.
        samples: prompts.
        responses: their responses.
        invalid: what to do where the checker raises or gives no finite number: stop, or count the response as wrong.

    Raises:
        ValueError: naming the sample, if there is such a response and ``invalid`` is ``"stop"``.
    """
    try:
        results = reward(samples, responses)
    except Exception:
        # which one was it?
        results = [_alone(reward, s, r, invalid) for s, r in zip(samples, responses, strict=True)]
    if len(results) != len(samples):
        raise ValueError(
            f"The reward {type(reward).__name__} gave {len(results)} results for {len(samples)} responses; it must"
            " give one each, in order."
        )
    return [
        result if math.isfinite(result.value) else _refuse(reward, s, r, f"gave {result.value}", invalid)
        for result, s, r in zip(results, samples, responses, strict=True)
    ]


def _alone(reward: Reward, sample: Sample, response: str, invalid: InvalidReward) -> RewardResult:
    try:
        (result,) = reward([sample], [response])
    except Exception as error:
        return _refuse(reward, sample, response, f"raised {type(error).__name__}: {error}", invalid, error)
    return result


def _refuse(
    reward: Reward,
    sample: Sample,
    response: str,
    what: str,
    invalid: InvalidReward,
    cause: Exception | None = None,
) -> RewardResult:
    message = (
        f"The reward {type(reward).__name__} {what}, for sample {sample.sample_id} of task {sample.task!r}, prompt"
        f" {sample.prompt[:_SHOWN]!r}, response {response[:_SHOWN]!r}."
    )
    if invalid == "stop":
        raise ValueError(
            f"{message} Mend it, or set `invalid_reward: wrong` to count such responses as wrong."
        ) from cause
    rank_zero_warn(f"{message} It counts as wrong.")
    return RewardResult(0.0, False, None)


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Chance that at least one of k responses is right, ``1 - C(n - c, k) / C(n, k)``, without bias.

    Args:
        correct: c, right responses.
        samples: n, responses.
        k: how many one would have, at most n.

    Example::

        >>> pass_at_k(correct=1, samples=4, k=2)
        0.5

    Reference: Chen et al. 2021 (arXiv 2107.03374), equation 1.
    """
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def distinct_correct_at_k(results: Sequence[RewardResult], k: int) -> float:
    """Expected number of different right answers among k of n responses, ``sum_a 1 - C(n - n_a, k) / C(n, k)``.

    Example::

        >>> right = [RewardResult(1.0, True, answer) for answer in ("1+4", "2+3", "2+3", "2+3")]
        >>> distinct_correct_at_k(right, k=2)
        1.5
    """
    found = Counter(result.answer for result in results if result.correct and result.answer is not None)
    return sum(pass_at_k(count, len(results), k) for count in found.values())


def majority_at_k(results: Sequence[RewardResult], k: int) -> float:
    """Chance that the most frequent answer of k responses is right, over the consecutive k of them.

    Responses without an answer have no vote; among answers that are equally frequent one is drawn.

    Example::

        >>> votes = [RewardResult(0.0, False, "5"), RewardResult(1.0, True, "7"), RewardResult(1.0, True, "7")]
        >>> majority_at_k(votes, k=3)
        1.0
    """
    chances = []
    for start in range(0, len(results) - k + 1, k):
        votes = [result for result in results[start : start + k] if result.answer is not None]
        count = Counter(result.answer for result in votes)
        winners = [answer for answer, number in count.items() if number == max(count.values())]
        right = {result.answer for result in votes if result.correct}
        chances.append(sum(answer in right for answer in winners) / max(1, len(winners)))
    return sum(chances) / max(1, len(chances))
