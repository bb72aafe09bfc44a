"""From prompts to a batch of judged responses with statistics."""

from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from litropy.callbacks.on_policy_score import OnPolicyScore
from litropy.losses import HeadStats
from litropy.recipes.causal_lm import CausalLM
from litropy.recipes.prompts import PromptBatches
from litropy.recipes.rlvr_judging import InvalidReward, judge
from litropy.recipes.rlvr_samples import Reward, RewardResult, Sample
from litropy.recipes.rlvr_sampling import Generation, RolloutEngine, RolloutRequest
from litropy.recipes.steering.batch import RolloutBatch, stat
from litropy.recipes.steering.sampler import Sampler

__all__ = ["Judged", "mini_batches", "respond", "rollout_metrics", "to_batch", "warn_if_off_policy"]


class Judged(NamedTuple):
    """Responses to some prompts and what became of them.

    Attributes:
        request: what the engine was asked for.
        generation: what it wrote.
        texts: the responses, without special tokens.
        results: what the reward said.
    """

    request: RolloutRequest
    generation: Generation
    texts: list[str]
    results: list[RewardResult]


def _end_tokens(tokenizer: Any, generation_config: Any) -> list[int]:
    """Tokens that end a response: the tokenizer's, and those that the model's own settings name."""
    named = getattr(generation_config, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return sorted({token for token in (tokenizer.eos_token_id, *named) if token is not None})


def respond(
    policy: CausalLM,
    engine: RolloutEngine,
    sampler: Sampler,
    samples: list[Sample],
    reward: Reward,
    tokenizer: Any,
    *,
    group_size: int,
    max_new_tokens: int,
    seed: int,
    invalid: InvalidReward,
) -> Judged:
    """Let the engine respond to prompts, and judge the responses.

    Raises:
        RuntimeError: if the engine fails.
        ValueError: if a reward is invalid, and that is to stop the run.
    """
    device = policy.head.weight.device if hasattr(policy.head, "weight") else next(policy.parameters()).device
    prompts = PromptBatches([sample.prompt for sample in samples], tokenizer)[np.arange(len(samples))]
    ends = _end_tokens(tokenizer, getattr(policy.causal_lm, "generation_config", None))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    ids, mask = prompts["input_ids"].to(device), prompts["attention_mask"].to(device)
    request = RolloutRequest(ids, mask, group_size, max_new_tokens, ends, pad, seed)
    try:
        generation = engine.generate(policy, request, sampler)
    except Exception as error:
        raise RuntimeError(
            f"The rollout engine {type(engine).__name__} failed on {len(samples)} prompts ({type(error).__name__}:"
            f" {error}). Nothing of this batch was trained on; `--ckpt_path last` goes on from the last checkpoint."
        ) from error
    rows = zip(generation.responses.tolist(), generation.mask.sum(-1).tolist(), strict=True)
    texts = tokenizer.batch_decode([row[:length] for row, length in rows], skip_special_tokens=True)
    repeated = [sample for sample in samples for _ in range(group_size)]
    return Judged(request, generation, texts, judge(reward, repeated, texts, invalid))


def to_batch(judged: Judged, first_row: int) -> RolloutBatch:
    """The batch without statistics, its rows numbered from ``first_row``, a multiple of the group size."""
    request, generation = judged.request, judged.generation
    size, device = request.group_size, generation.responses.device
    row = torch.arange(first_row, first_row + len(generation.responses), device=device)
    return RolloutBatch(
        prompts=request.prompts.repeat_interleave(size, 0),
        prompt_mask=request.prompt_mask.repeat_interleave(size, 0).bool(),
        responses=generation.responses,
        mask=generation.mask,
        behaviour=generation.behaviour,
        temperature=generation.temperature,
        row=row,
        group=row // size,
        reward=torch.tensor([result.value for result in judged.results], device=device),
        correct=torch.tensor([result.correct for result in judged.results], device=device),
        truncated=generation.truncated,
        stats=HeadStats(),
    )


def mini_batches(batch: RolloutBatch, groups: int | None) -> list[Tensor]:
    """Rows of each mini-batch of so many groups, in order; None for one of all."""
    index, count = batch.group_index()
    if not len(count):
        return []
    size = groups or len(count)
    return [((index >= start) & (index < start + size)).nonzero()[:, 0] for start in range(0, len(count), size)]


def _on_policy_sums(batch: RolloutBatch) -> tuple[Tensor, Tensor]:
    """Sums over all tokens of ``-log pi - H`` and of the varentropy, of which the on-policy score is made."""
    excess = -stat(batch.stats, "logprob") - stat(batch.stats, "entropy")
    return torch.where(batch.mask, excess, 0).sum(), stat(batch.stats, "varentropy").sum()


def warn_if_off_policy(z: float) -> bool:
    """Warn if the tokens cannot have been drawn from what the trainer takes for the policy; whether it did."""
    sentence = OnPolicyScore(decay=0.0).judge(z)
    if sentence is not None:
        rank_zero_warn(f"Engine and trainer disagree: {sentence}")
    return sentence is not None


def rollout_metrics(batch: RolloutBatch) -> dict[str, Tensor]:
    """What a batch of responses tells about the policy, scalars; over all ranks if the batch is."""
    count = batch.mask.sum().clamp(min=1)
    gap = torch.where(batch.mask, stat(batch.stats, "logprob") - batch.behaviour, 0).abs().sum() / count
    return {
        "reward/mean": batch.reward.mean(),
        "reward/correct": batch.correct.float().mean(),
        "rollout/length": batch.lengths.float().mean(),
        "rollout/truncated": batch.truncated.float().mean(),
        "rollout/equal_reward_groups": batch.equal_rewards().float().mean(),
        "rollout/engine_gap": gap,
        "rollout/on_policy_z": OnPolicyScore(decay=0.0).update(*_on_policy_sums(batch)),
        "entropy/output": stat(batch.stats, "entropy").sum() / count,
    }
