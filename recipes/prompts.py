"""Prompts for generation: read, tokenized, and padded on the left."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litropy.recipes.text_files import read_text

__all__ = ["PromptBatches", "decode_completions", "read_prompts"]

Prompt = str | list[dict[str, str]]


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts from a file.

    Args:
        path: a .jsonl file with ``prompt`` (text) or ``messages`` (a conversation that waits for an answer) in each
            line, or any other text file with a prompt in each line. Blank lines are left out.

    Raises:
        ValueError: if the file is missing or empty, or a line has no prompt, naming the line.
    """
    if not path.is_file():
        raise ValueError(f"There is no file of prompts {path}.")
    lines = [(number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"The file of prompts {path} is empty; write one in each line.")
    if path.suffix.lower() != ".jsonl":
        return [line for _, line in lines]
    return [_parse(line, f"{path}, line {number}") for number, line in lines]


def _parse(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error.msg}, column {error.colno}).") from error
    if isinstance(record, dict) and isinstance(record.get("prompt"), str):
        return record["prompt"]
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        return record["messages"]
    raise ValueError(f"{where}: expected an object with `prompt` (text) or `messages` (a list).")


class PromptBatches:
    """Batches of prompts, padded on the left, with ``input_ids`` and ``attention_mask`` [B, T].

    Args:
        prompts: texts, or conversations.
        tokenizer: of Hugging Face.
    """

    def __init__(self, prompts: list[Prompt], tokenizer: Any) -> None:
        self.ids = [_encode(prompt, tokenizer) for prompt in prompts]
        self.pad = tokenizer.pad_token_id

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: np.ndarray) -> dict[str, Tensor]:
        # a rank without a prompt of its own repeats the last, so that all ranks take part in generation
        chosen = [self.ids[row] for row in rows if row >= 0] or [self.ids[-1]]
        width = max(map(len, chosen))
        ids = torch.full((len(chosen), width), self.pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(chosen):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        return {"input_ids": ids, "attention_mask": mask}


def _encode(prompt: Prompt, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        ids = [token for token in tokenizer("")["input_ids"] if token != tokenizer.eos_token_id]
        ids += tokenizer(prompt, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    return ids or [tokenizer.eos_token_id]  # nothing at all: a new text begins


def decode_completions(tokens: Tensor, width: int, tokenizer: Any) -> list[dict[str, str]]:
    """Texts of generated ids [B, T], whose first ``width`` columns are the prompts, padded on the left."""
    prompts = tokenizer.batch_decode(tokens[:, :width], skip_special_tokens=True)
    completions = tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
    return [{"prompt": p, "completion": c} for p, c in zip(prompts, completions, strict=True)]
