"""From a training checkpoint of ours to a Hugging Face folder, without building a trainer."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from litropy.callbacks.compressed_checkpoint_loading import is_torch_file, read_checkpoint
from litropy.callbacks.sigma_reparam_weights import folded_state_dict
from litropy.recipes.hugging_face_folder import write_folder
from litropy.recipes.model_source import random_model
from litropy.recipes.plain_weights import tie

__all__ = ["export_checkpoint"]

_PREFIX = "model.causal_lm."


def export_checkpoint(path: Path, folder: Path, tokenizer: str | None = None) -> None:
    """Write the model of a training checkpoint as a Hugging Face folder, bit for bit, SigmaReparam folded.

    Args:
        path: checkpoint of a ``LanguageModel`` or ``RLVR``, compressed or of ``torch.save``.
        folder: where to write.
        tokenizer: folder or name of the tokenizer to put beside the weights; None takes that of the run, if its
            ``hugging_face`` folder is there.

    Raises:
        ValueError: if the file is no such checkpoint, is damaged, or holds LoRA adapters.
    """
    checkpoint = _read(path)
    if "causal_lm_config" not in checkpoint:
        raise ValueError(f"{path} is no checkpoint of a LanguageModel: it does not say which model it is of.")
    state = {name: value for name, value in checkpoint["state_dict"].items() if name.startswith(_PREFIX)}
    weights = folded_state_dict({name.removeprefix(_PREFIX): value for name, value in state.items()})
    model = _model(json.loads(checkpoint["causal_lm_config"]), weights, path)
    kept = path.absolute().parent.parent / "hugging_face"
    if tokenizer is None and (kept / "tokenizer_config.json").is_file():
        tokenizer = str(kept)
    write_folder(
        model, None if tokenizer is None else AutoTokenizer.from_pretrained(tokenizer), folder, tie(model, weights)
    )


def _read(path: Path) -> dict[str, Any]:
    if not is_torch_file(path):
        return read_checkpoint(path, without=("optimizer_states",))
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values, and is not unpickled. Load it with"
            " `LanguageModel.load_from_checkpoint`, and export what its `save_pretrained` writes."
        ) from error


def _model(config: dict[str, Any], weights: dict[str, Tensor], path: Path) -> Any:
    """The architecture alone; its weights are only compared."""
    dtype = next(value.dtype for value in weights.values() if value.is_floating_point())
    with torch.device("meta"):
        model = random_model(AutoConfig.for_model(config.pop("model_type"), **config), dtype)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if any(".lora_" in name for name in found):
        raise ValueError(
            f"{path} holds LoRA adapters, and not how they are scaled. CompressedExport merges them in training:"
            " `when: best` or `when: save`."
        )
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise ValueError(f"{path} does not hold the weights of its {type(model).__name__}: {wrong[0]} is not the same.")
    return model
