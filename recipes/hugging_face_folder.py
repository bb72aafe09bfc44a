"""Write a model and its tokenizer as a Hugging Face folder, whole or not at all."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from litropy.recipes.output_head import inner_causal_lm

__all__ = ["write_folder"]


def write_folder(model: Any, tokenizer: Any, folder: Path, state_dict: dict[str, Tensor]) -> None:
    """Write weights, config and tokenizer so that ``from_pretrained(folder)`` loads them.

    A folder of that name appears only when it is complete; an earlier Hugging Face folder there is replaced.

    Args:
        model: Hugging Face model, or a ``PeftModel`` around one, whose adapters ``state_dict`` has merged.
        tokenizer: Hugging Face tokenizer, or None to leave it out.
        folder: where to write.
        state_dict: the model's weights, gathered.

    Raises:
        ValueError: if the folder exists and holds something else.
    """
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "config.json").is_file())):
        raise ValueError(f"{folder} exists and is no Hugging Face folder; it is not overwritten. Give another name.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        _save(inner_causal_lm(model), new, state_dict)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        new.chmod(0o755)
        if folder.exists():
            shutil.move(folder, old)
        shutil.move(new, folder)


def _save(model: Any, folder: Path, state_dict: dict[str, Tensor]) -> None:
    # a model that was given adapters would save them alone
    adapted = getattr(model, "_hf_peft_config_loaded", False)
    model._hf_peft_config_loaded = False
    try:
        model.save_pretrained(folder, state_dict=state_dict)
    finally:
        model._hf_peft_config_loaded = adapted
