"""Where a causal language model comes from: a config (random weights), or a name or folder (pretrained weights)."""

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

__all__ = ["build_config", "check_vocabulary", "checkpoint_layers", "load_pretrained", "random_model"]

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def _closest(word: str, words: list[str]) -> str:
    matches = difflib.get_close_matches(word, words, n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def _read(config: dict[str, Any] | str | Path) -> dict[str, Any]:
    if isinstance(config, dict):
        return dict(config)
    path = Path(config)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ValueError(f"`config` names {str(config)!r}, which is no file; give a JSON file or the keys themselves.")
    text = path.read_text(encoding="utf-8")
    try:
        keys = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`config` file {path} cannot be read: {error}") from error
    if not isinstance(keys, dict):
        raise ValueError(f"`config` file {path} holds {type(keys).__name__}; it must hold keys and values.")
    return {key: value for key, value in keys.items() if key not in ("architectures", "transformers_version")}


def build_config(config: dict[str, Any] | str | Path, tokenizer: Any = None, pad_vocab_to: int = 1) -> PretrainedConfig:
    """Make a model config from keys, filling in vocabulary size and special tokens from the tokenizer.

    Args:
        config: ``{"model_type": "llama", "hidden_size": 64, ...}``, or a JSON file with such keys.
        tokenizer: Hugging Face tokenizer whose size and special tokens to take where the keys do not say.
        pad_vocab_to: the vocabulary size taken from the tokenizer is rounded up to a multiple of this.

    Raises:
        ValueError: if the model type or a key is unknown, or the keys do not fit together.
    """
    keys = _read(config)
    model_type = keys.pop("model_type", None)
    known_types = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if model_type not in known_types:
        raise ValueError(
            f"`config` has model_type {model_type!r}, which is no causal language model of transformers."
            f"{_closest(str(model_type), known_types)} Examples: llama, qwen3, gemma2, gpt2."
        )
    config_class = CONFIG_MAPPING[model_type]
    known = {*config_class().to_dict(), *config_class.attribute_map}
    for key in keys:
        if key not in known:
            raise ValueError(
                f"`config` key {key!r} is unknown to model_type {model_type!r}.{_closest(key, sorted(known))}"
            )
    if tokenizer is not None:
        size = len(tokenizer)
        keys.setdefault("vocab_size", -(-size // pad_vocab_to) * pad_vocab_to)
        bos, eos, pad = (getattr(tokenizer, name) for name in _SPECIAL)
        # an embedding never learns its padding token, so a token with another use must not be it
        special = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": None if pad in (bos, eos) else pad}
        keys = {**special, **keys}
    try:
        return AutoConfig.for_model(model_type, **keys)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ValueError(f"`config` does not make a {model_type} model: {' '.join(reason)}") from error


def random_model(config: PretrainedConfig, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """Build a model with random weights; they depend on PyTorch's random state alone.

    Raises:
        ValueError: if the config's numbers do not make a model.
    """
    options = {"attn_implementation": attention} if attention else {}
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"`config` does not make a {config.model_type} model: {error}") from error


def load_pretrained(name: str, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """Load a model by hub name or from a folder.

    Raises:
        ValueError: if there is no such model.
    """
    options = {"attn_implementation": attention} if attention else {}
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        looks_local = Path(name).exists() or name.startswith((".", "/", "~"))
        where = (
            "the folder must hold config.json and its weights"
            if looks_local
            else "no such folder, nor found on the hub"
        )
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"`pretrained` is {name!r}: {where} ({reason}). Give a folder written by `save_pretrained` or the name of"
            f" a causal language model."
        ) from error


def check_vocabulary(tokenizer: Any, model: PreTrainedModel) -> None:
    """Raise ValueError if the tokenizer can give ids that the model's head has no row for."""
    size, rows = len(tokenizer), model.get_output_embeddings().weight.shape[0]
    if size > rows:
        raise ValueError(
            f"The tokenizer has {size} tokens, but the output head of {type(model).__name__} has {rows} rows."
            " Use the model's own tokenizer, or raise `vocab_size` in the model's config (or leave it out)."
        )


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Let decoder layers recompute their activations in the backward pass.

    Raises:
        ValueError: if the architecture cannot do so.
    """
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
