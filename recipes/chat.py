"""From documents to token ids, and for conversations and prompts which of them are to be learnt."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from litropy.recipes.text_records import Kind

__all__ = ["DEFAULT_CHAT_TEMPLATE", "Encoder"]

# every turn starts on its own line, so that its content is tokenized alike in training and generation
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)

Encoded = tuple[np.ndarray, np.ndarray | None]


class Encoder:
    """Tokenize documents with whatever the tokenizer puts around a text, and an end-of-text token.

    Args:
        tokenizer: of Hugging Face, with an end-of-text token and a chat template.
        kind: of the documents.
    """

    def __init__(self, tokenizer: Any, kind: Kind) -> None:
        self.tokenizer = tokenizer
        self.kind = kind
        self.eos = tokenizer.eos_token_id
        # most tokenizers put nothing in front of a text, some a begin-of-text token
        self.prefix = [token for token in tokenizer("")["input_ids"] if token != self.eos]

    def __call__(self, items: Sequence[Any]) -> Iterator[Encoded]:
        """Yield ids, and whether each is a target (None: all are), for each document."""
        if self.kind == "text":
            yield from ((self._array(self.prefix + ids + [self.eos]), None) for ids in self._encode(list(items)))
        elif self.kind == "prompt_completion":
            prompts = self._encode([prompt for prompt, _ in items])
            completions = self._encode([completion for _, completion in items])
            for prompt, completion in zip(prompts, completions, strict=True):
                given = self.prefix + prompt
                learnt = completion + [self.eos]
                yield self._array(given + learnt), np.repeat([False, True], [len(given), len(learnt)])
        else:
            yield from map(self._conversation, items)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _array(self, ids: list[int]) -> np.ndarray:
        return np.asarray(ids, dtype=np.int64)

    def _conversation(self, messages: list[dict[str, str]]) -> Encoded:
        if "{% generation" in self.tokenizer.chat_template or "{%- generation" in self.tokenizer.chat_template:
            encoded = self._template(messages, return_assistant_tokens_mask=True)
            ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        else:
            ids, mask = self._by_prefix(messages)
        if ids and ids[-1] == self.eos:
            mask[-1] = 1
        return self._array(ids), np.asarray(mask, dtype=bool)

    def _by_prefix(self, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        """Find assistant turns by tokenizing the conversation up to the start and the end of each."""
        ids = self._template(messages)["input_ids"]
        mask = [0] * len(ids)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._template(messages[:turn], add_generation_prompt=True)["input_ids"] if turn else []
            after = self._template(messages[: turn + 1])["input_ids"]
            start, end = _common(before, ids), _common(after, ids)
            mask[start:end] = [1] * (end - start)
        return ids, mask

    def _template(self, messages: list[dict[str, str]], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        except Exception as error:  # jinja's errors, and those that a template raises itself
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"The tokenizer's chat template does not take a conversation of the roles {roles}: {error}"
            ) from error


def _common(first: list[int], second: list[int]) -> int:
    """Length of the common beginning."""
    count = min(len(first), len(second))
    differ = np.flatnonzero(np.asarray(first[:count]) != np.asarray(second[:count]))
    return int(differ[0]) if len(differ) else count
