"""Tensors to compress: Gaussian weights, checkpoints of the CPU quickstart and of a fine-tuned published model."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from checkpoint_finetune import finetune, published_folder
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG = "quickstart/pretrain_cpu.yaml"
CACHE = Path("runs/benchmarks/checkpoints")
LAST = 160
APART = (1, 10, 50)
LAST_FINETUNED = 100


class Source(NamedTuple):
    """A file of tensors, and for a difference the one of an earlier checkpoint."""

    data: str
    dtype: str  # "mixed" where there are several
    path: Path
    apart: int = 0  # steps from the earlier one
    base: Path | None = None


class KeepSteps(Callback):
    """Write the tensors of the checkpoints of some steps as safetensors files.

    Args:
        folder: where to write.
        steps: which steps.
    """

    def __init__(self, folder: str, steps: list[int]) -> None:
        self.folder = Path(folder)
        self.steps = steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        """Write one if it is time."""
        step = trainer.global_step
        if step in self.steps:
            tensors = {f"state_dict/{name}": x for name, x in pl_module.state_dict().items()}
            for number, state in trainer.optimizers[0].state_dict()["state"].items():
                tensors |= {f"optimizer/{number}/{name}": x for name, x in state.items() if isinstance(x, Tensor)}
            save(tensors, self.folder / f"step_{step}.safetensors")


def save(tensors: Mapping[str, Tensor], path: Path) -> Path:
    """Write tensors, each with memory of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.detach().clone().contiguous() for name, x in tensors.items()}, path)
    return path


def gaussian(folder: Path, elements: int) -> Iterator[Source]:
    """Weights of standard deviation 0.02, and what is left of a difference where half of them moved a little."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(elements, generator=generator).mul_(0.02)
    moved = weight + 1e-5 * torch.randn(elements, generator=generator) * (torch.arange(elements) % 2)
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        old = save({"weight": weight.to(dtype)}, folder / f"gaussian_{name}.safetensors")
        new = save({"weight": moved.to(dtype)}, folder / f"gaussian_{name}_moved.safetensors")
        yield Source("Gaussian", name, old)
        yield Source("Gaussian, half of it moved", name, new, 1, old)


def published(folder: Path) -> Iterator[Source]:
    """The weights that the package carries.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    loaded = load_file(published_folder() / "model.safetensors")
    weights = {name: x for name, x in loaded.items() if x.is_floating_point()}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        cast = {key: x.to(dtype) for key, x in weights.items()}
        yield Source("MiniLM", name, save(cast, folder / f"minilm_{name}.safetensors"))


def quickstart(folder: Path) -> Iterator[Source]:
    """Checkpoints of the quickstart, trained unless they are there: weights with AdamW, and weights in bfloat16."""
    steps = [LAST, *(LAST - apart for apart in APART)]
    folder = folder.resolve()
    if not _all_there(folder, steps):
        _train(folder, steps)
    yield from _checkpoints("quickstart", folder, steps)


def finetuned(folder: Path) -> Iterator[Source]:
    """Checkpoints of the fine-tuned model, trained unless they are there.

    Raises:
        ModuleNotFoundError: if the package with the model is not installed.
    """
    steps = [LAST_FINETUNED, *(LAST_FINETUNED - apart for apart in APART)]
    if not _all_there(folder, steps):
        print(f"Fine-tuning MiniLM in {folder}", flush=True)
        kept: dict[int, dict[str, Tensor]] = {}
        finetune(steps, kept)
        for step, tensors in kept.items():
            save(tensors, folder / f"step_{step}.safetensors")
    yield from _checkpoints("MiniLM, fine-tuned", folder, steps)


def _all_there(folder: Path, steps: list[int]) -> bool:
    return all((folder / f"step_{step}.safetensors").exists() for step in steps)


def _checkpoints(name: str, folder: Path, steps: list[int]) -> Iterator[Source]:
    """The first of the steps by itself, and against the others."""
    for kind, dtype in ((f"{name} with AdamW", "mixed"), (f"{name} weights", "bfloat16")):
        files = {step: _part(folder / f"step_{step}.safetensors", dtype) for step in steps}
        for base in steps:
            apart = steps[0] - base
            yield Source(kind, dtype, files[steps[0]], apart, files[base] if apart else None)


def _train(folder: Path, steps: list[int]) -> None:
    print(f"Training {CONFIG} in {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    keep = f"{{class_path: checkpoint_sources.KeepSteps, init_args: {{folder: '{folder}', steps: {steps}}}}}"
    command = [sys.executable, "-m", "litropy", "fit", "--config", CONFIG, f"--trainer.callbacks+={keep}"]
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def _part(path: Path, dtype: str) -> Path:
    """Everything, or the weights alone in bfloat16, as a model is exported."""
    if dtype == "mixed":
        return path
    part = path.with_name(f"{path.stem}_{dtype}.safetensors")
    if not part.exists():
        weights = {name: x for name, x in load_file(path).items() if name.startswith("state_dict/")}
        save({name: x.to(getattr(torch, dtype)) for name, x in weights.items() if x.is_floating_point()}, part)
    return part
