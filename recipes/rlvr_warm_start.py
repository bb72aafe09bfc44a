"""The supervised phase before RL: learn the form of answers from known solutions."""

from typing import Any

import torch
from torch import Tensor

from litropy.recipes.prompts import PromptBatches
from litropy.recipes.rlvr_samples import Sample
from litropy.recipes.target_rows import target_rows

__all__ = ["solution_batch"]


def solution_batch(samples: list[Sample], tokenizer: Any, device: torch.device) -> dict[str, Tensor]:
    """Prompts with their solutions and an end token, padded on the right; only solutions and end are targets.

    Args:
        samples: with solutions.
        tokenizer: of Hugging Face.
        device: where to put the tensors.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, int64 [B, T], and ``target_rows`` [n] where many positions
        have no target.

    Raises:
        ValueError: naming a sample without a solution.
    """
    for sample in samples:
        if sample.solution is None:
            raise ValueError(
                f"The warm start learns from solutions, and sample {sample.sample_id} of task {sample.task!r} has none;"
                " set `warm_start_steps: 0`, or choose a task that knows its solutions."
            )
    prompts = PromptBatches([sample.prompt for sample in samples], tokenizer).ids
    end = [tokenizer.eos_token_id]
    answers = [tokenizer(sample.solution, add_special_tokens=False)["input_ids"] + end for sample in samples]
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for place, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
        labels[place, len(prompt) : len(row)] = torch.tensor(row[len(prompt) :])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    wanted = target_rows(labels.numpy())
    if wanted is not None:
        batch["target_rows"] = torch.from_numpy(wanted)
    return {name: value.to(device) for name, value in batch.items()}
