"""Train a byte-level BPE, or load a tokenizer of Hugging Face."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from litropy.recipes.cache_folder import cache_key
from litropy.recipes.chat import DEFAULT_CHAT_TEMPLATE

__all__ = ["load_tokenizer", "tokenizer_key", "train_tokenizer"]

_END = "<|endoftext|>"
_PAD = "<|padding|>"
_SMALLEST = 256 + 2  # every byte, and the two special tokens


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE and save it as a Hugging Face folder.

    Its tokens of begin and end are the same, as in GPT-2; it has a pad token and a chat template. Any text can be
    encoded and comes back unchanged.

    Args:
        texts: what to train on.
        vocab_size: number of tokens, special ones included; fewer come out of a short text.
        folder: where to save.

    Raises:
        ValueError: if the vocabulary is too small for all bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < _SMALLEST:
        raise ValueError(f"`vocab_size` is {vocab_size}; a byte-level tokenizer needs at least {_SMALLEST}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END, _PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_END,
        eos_token=_END,
        pad_token=_PAD,
        clean_up_tokenization_spaces=False,
        chat_template=DEFAULT_CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer, and give it what training needs and it may lack: a pad token and a chat template.

    Args:
        name: on the Hugging Face hub, or a folder.

    Raises:
        ValueError: if there is none, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        kind = "the folder has no tokenizer" if Path(name).is_dir() else "it is neither a folder nor a name on the hub"
        raise ValueError(
            f"The tokenizer {name!r} could not be loaded: {kind}, or the hub cannot be reached."
            " Leave `tokenizer` out to train one on the data."
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"The tokenizer {name!r} has no fast version, which this needs; choose one with a tokenizer.json."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer {name!r} has no end-of-text token; set `eos_token` in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return tokenizer


def tokenizer_key(tokenizer: Any) -> str:
    """Name that changes when the tokenizer would encode anything differently."""
    return cache_key(
        backend=tokenizer.backend_tokenizer.to_str(),
        template=tokenizer.chat_template,
        special=[tokenizer.bos_token_id, tokenizer.eos_token_id],
    )
