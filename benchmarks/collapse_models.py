"""Tiny language models and the texts that they are trained on: one collapses, one only looks as if it did.

Shape key: B sequences, T positions, V vocabulary, D width.
"""

import math

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, OPTConfig

V = T = D = 64
HEADS, BATCH = 4, 16
_BLOCK = 2048


def markov_sequences(seed: int, number: int, part: int = 0) -> Tensor:
    """Sequences [number, T] of the random Markov chain of a seed, whose rows are drawn from a Dirichlet(0.1).

    Args:
        seed: of the chain and of its sequences.
        number: of sequences; more of them begin with the same ones.
        part: sequences of different parts are independent.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch._sample_dirichlet(torch.full((V, V), 0.1, dtype=torch.float64), generator=generator).cumsum(1)
    return torch.cat([_walk(rows, _generator(seed, part, block)) for block in range(-(-number // _BLOCK))])[:number]


def _generator(seed: int, part: int, block: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1000 + part + 1) * 1000 + block + 1)


def _walk(cumulative: Tensor, generator: torch.Generator) -> Tensor:
    tokens = [torch.randint(V, (_BLOCK,), generator=generator)]
    for draw in torch.rand(T - 1, _BLOCK, 1, generator=generator, dtype=torch.float64):
        tokens.append(torch.searchsorted(cumulative[tokens[-1]], draw)[:, 0].clamp(max=V - 1))
    return torch.stack(tokens, 1)


def copy_sequences(seed: int, number: int, part: int = 0) -> Tensor:
    """Random sequences [number, T] whose second half repeats the first."""
    blocks = range(-(-number // _BLOCK))
    half = [torch.randint(V, (_BLOCK, T // 2), generator=_generator(seed, part, block)) for block in blocks]
    return torch.cat(half)[:number].repeat(1, 2)


def labels_of(tokens: Tensor, task: str) -> Tensor:
    """The next token of each; -100 at the end, and where copying cannot know it."""
    labels = F.pad(tokens[:, 1:], (0, 1), value=-100)
    if task == "copy":
        labels[:, : T // 2 - 1] = -100
    return labels


def sequences(task: str, seed: int, number: int, part: int = 0) -> Tensor:
    """Sequences of a task, "markov" or "copy"."""
    return {"markov": markov_sequences, "copy": copy_sequences}[task](seed, number, part)


def batches(task: str, seed: int, steps: int) -> DataLoader:
    """One batch for each step, the same for every run of a task and seed."""
    tokens = sequences(task, seed, steps * BATCH)
    return DataLoader(TensorDataset(tokens, labels_of(tokens, task)), BATCH)


def tiny_decoder(seed: int, layers: int = 4, post_ln: bool = False, sharp: float = 1.0) -> nn.Module:
    """A Hugging Face decoder of about 50,000 parameters a layer, with weights of variance 1 / fan-in.

    Args:
        seed: of the weights.
        layers: how many.
        post_ln: normalise after each block's sum, as the first transformers did, instead of before the block.
        sharp: factor of the initial queries and keys.
    """
    config = OPTConfig(
        vocab_size=V,
        hidden_size=D,
        word_embed_proj_dim=D,
        ffn_dim=4 * D,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        max_position_embeddings=T,
        do_layer_norm_before=not post_ln,
        enable_bias=False,
        activation_function="gelu",
        dropout=0.0,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name, part in model.named_modules():
            if isinstance(part, nn.Linear):
                narrow = math.sqrt(2 * layers) if name.endswith(("out_proj", "fc2")) else 1.0
                nn.init.normal_(part.weight, std=part.in_features**-0.5 / narrow)
                if name.endswith(("q_proj", "k_proj")):
                    part.weight.data.mul_(sharp)
            elif isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=D**-0.5)
    return model.train()


class TinyLM(LightningModule):
    """Trains a decoder with Adam at a constant rate, without warm-up, decay and clipping.

    Args:
        model: the decoder.
        learning_rate: of all parameters.
    """

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.losses: list[float] = []

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy [nats]."""
        logits = self.model(tokens, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Note the loss, and return it."""
        loss = self.loss(*batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), self.learning_rate, betas=(0.9, 0.95))
