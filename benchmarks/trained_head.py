"""Hidden states, head and targets of the model that the CPU quickstart trains: what a learnt softmax looks like.

The model is trained through the command line into a cache folder, once; its hidden states on held-out text are
kept beside it.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from litropy.config_files import find_config

CONFIG = "quickstart/pretrain_cpu.yaml"
CACHE = Path("runs/benchmarks")
WINDOW = 256


class TrainedHead(NamedTuple):
    """M tokens of held-out text as the output head sees them, in float32."""

    hidden: Tensor  # [M, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [M]
    counts: Tensor  # [V], how often the training text has each token

    @staticmethod
    def load(path: Path) -> "TrainedHead":
        """Read what ``save`` wrote."""
        return TrainedHead(**load_file(path))

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        save_file(self._asdict(), path)

    def sample(self, tokens: int) -> "TrainedHead":
        """So many tokens in windows of ``WINDOW``, evenly spread over the text; repeated if there are not enough."""
        first = torch.linspace(0, max(0, len(self.hidden) - WINDOW), -(-tokens // WINDOW)).long()
        index = (first[:, None] + torch.arange(WINDOW)).flatten()[:tokens] % len(self.hidden)
        return self._replace(hidden=self.hidden[index], target=self.target[index])


def config_steps() -> int:
    """Training steps of the config."""
    return yaml.safe_load(find_config(CONFIG).read_text())["trainer"]["max_steps"]


def trained_file(cache: Path, steps: int | None = None, overrides: Sequence[str] = ()) -> Path:
    """Train unless the cache folder has the model already, and return the path of its ``TrainedHead``.

    Args:
        cache: folder for everything that this makes.
        steps: training steps; None for those of the config.
        overrides: further options of ``litropy fit``.
    """
    steps = steps or config_steps()
    folder = cache.resolve() / f"steps_{steps}"
    path = folder / "head.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"Training {CONFIG} in {folder}", flush=True)
        command = [sys.executable, "-m", "litropy", "fit", "--config", CONFIG, "--trainer.max_steps", str(steps)]
        subprocess.run([*command, *overrides], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        runs = (folder / "runs").glob("*/version_*/hugging_face")  # one that was broken off has no such folder
        _read(max(runs, key=lambda run: run.stat().st_mtime).parent).save(path)
    return path


@torch.no_grad()
def _read(run: Path) -> TrainedHead:
    """Run the trained model over all of its held-out text."""
    # here, because the processes that only load the file would wait seconds for these
    from transformers import AutoModelForCausalLM

    from litropy.recipes.causal_lm import CausalLM, next_token_targets
    from litropy.recipes.text_data import TextDataModule

    settings: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]
    data = TextDataModule(**settings | {"cache_dir": str(run.parents[2] / settings["cache_dir"])})
    data.setup("validate")
    model = CausalLM(AutoModelForCausalLM.from_pretrained(run / "hugging_face")).eval()
    states, targets = [], []
    for batch in data.val_dataloader():
        inputs = {name: batch[name] for name in model.inputs if name in batch}
        hidden = model.backbone(**inputs, use_cache=False).last_hidden_state
        target = next_token_targets(batch["labels"])
        states.append(hidden[target >= 0])
        targets.append(target[target >= 0])
    weight = model.head.weight.detach().clone()
    tokens = torch.cat([batch["input_ids"].flatten() for batch in data.train_dataloader()])
    return TrainedHead(torch.cat(states), weight, torch.cat(targets), torch.bincount(tokens, minlength=len(weight)))
