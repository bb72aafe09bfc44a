"""A tokenizer whose tokens are single characters, for models too small to learn more."""

from collections.abc import Iterable
from typing import Any

__all__ = ["character_tokenizer"]

_END, _PAD, _UNKNOWN = "<|endoftext|>", "<|padding|>", "<|unknown|>"


def character_tokenizer(texts: Iterable[str]) -> Any:
    """Make a Hugging Face tokenizer with the characters of some texts, and three special tokens.

    Tokens of begin and end are the same, as in GPT-2; pad and unknown are others.

    Args:
        texts: with every character that there will be; others become the unknown token.

    Example::

        >>> tokenizer = character_tokenizer(["12+34=46"])
        >>> len(tokenizer), tokenizer.decode(tokenizer("6+4=")["input_ids"])
        (10, '6+4=')
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [_END, _PAD, _UNKNOWN, *sorted(set().union(*texts))]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}, _UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_END,
        eos_token=_END,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
