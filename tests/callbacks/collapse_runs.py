"""Real training runs of a few seconds that collapse, or look as if they did, with what monitors would measure.

A decoder of 200,000 parameters learns a random Markov chain or to copy, with Adam at a constant rate, without warm-up,
weight decay or clipping; attention is stored, so entropies come straight from it. Each run is made once a session.
"""

import functools
import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from litropy.callbacks.representation_metrics import effective_rank, mean_cosine, row_sums

VOCABULARY, LENGTH, WIDTH, HEADS, BATCH = 64, 64, 64, 4, 16
LEARNING_RATE = {"healthy": 3e-3, "collapse": 3e-2, "full": 1e-1, "sharp": 1e-2, "post_ln": 3e-2, "copy": 1e-2}


class Block(nn.Module):
    """A decoder layer that keeps its attention probabilities and logits."""

    def __init__(self, layers, post_ln=False):
        super().__init__()
        self.post_ln = post_ln
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, bias=False) for _ in range(2))
        for linear in (self.qkv, self.out, self.up, self.down):
            residual = linear in (self.out, self.down)
            std = linear.in_features**-0.5 / (math.sqrt(2 * layers) if residual else 1.0)
            nn.init.normal_(linear.weight, std=std)

    def attend(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT / math.sqrt(WIDTH // HEADS)
        logits = logits.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), -torch.inf)
        probabilities = logits.softmax(-1)
        self.logits, self.probabilities = logits.detach(), probabilities.detach()
        return self.out((probabilities @ v).transpose(1, 2).reshape(b, t, WIDTH))

    def forward(self, x):
        first, second = self.norms
        if self.post_ln:
            x = first(x + self.attend(x))
            return second(x + self.down(F.gelu(self.up(x))))
        x = x + self.attend(first(x))
        return x + self.down(F.gelu(self.up(second(x))))


class TinyDecoder(nn.Module):
    """Embeddings, blocks and a head; ``sharp`` scales the initial queries and keys."""

    def __init__(self, layers=4, post_ln=False, sharp=1.0):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Block(layers, post_ln) for _ in range(layers))
        self.norm = nn.Identity() if post_ln else nn.LayerNorm(WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for part in (self.tokens, self.positions, self.head):
            nn.init.normal_(part.weight, std=WIDTH**-0.5)
        with torch.no_grad():
            for block in self.layers:
                block.qkv.weight[: 2 * WIDTH] *= sharp

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.layers:
            x = block(x)
        return self.head(self.norm(x))

    def attention(self):
        """What an attention monitor measures in the last forward pass: normalised entropy, largest logit, [L, H]."""
        # four sequences; rows with few visible keys say little
        some, enough = slice(0, 4), slice(7, None)
        visible = torch.arange(1, LENGTH + 1).log()[enough]
        rows = [block.probabilities[some, :, enough] for block in self.layers]
        entropy = torch.stack([torch.special.entr(probabilities).sum(-1) for probabilities in rows])
        return {
            "attention/entropy": (entropy / visible).mean((1, 3)),
            "attention/max_logit": torch.stack([block.logits.amax((0, 2, 3)) for block in self.layers]),
        }


def markov_batches(seed, batch):
    """Sequences of a fixed random Markov chain: (tokens, targets), for ever."""
    generator = torch.Generator().manual_seed(seed)
    # rows of a Dirichlet distribution with parameter 0.1
    rows = torch._sample_dirichlet(torch.full((VOCABULARY, VOCABULARY), 0.1), generator=generator)
    while True:
        tokens = torch.randint(VOCABULARY, (batch, 1), generator=generator)
        for _ in range(LENGTH):
            following = torch.multinomial(rows[tokens[:, -1]], 1, generator=generator)
            tokens = torch.cat([tokens, following], 1)
        yield tokens[:, :-1], tokens[:, 1:]


def copy_batches(seed, batch):
    """Random halves that are to be repeated."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        half = torch.randint(VOCABULARY, (batch, LENGTH // 2), generator=generator)
        tokens = torch.cat([half, half], 1)
        targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
        targets[:, : LENGTH // 2 - 1] = -100
        yield tokens, targets


def make(kind, seed, batch=BATCH):
    """Model, batches and optimiser of a run."""
    torch.manual_seed(seed)
    model = TinyDecoder(2 if kind == "copy" else 4, post_ln=kind == "post_ln", sharp=6.0 if kind == "sharp" else 1.0)
    batches = (copy_batches if kind == "copy" else markov_batches)(seed, batch)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE[kind], betas=(0.9, 0.95))
    return model, batches, optimizer


@dataclass
class Run:
    """A run's losses, and for each step what attention and representation monitors would measure."""

    losses: list = field(default_factory=list)
    attention: list = field(default_factory=list)
    representation: dict = field(default_factory=dict)


@contextmanager
def quickly():
    """One thread, which is fastest for models of this size, and no subnormal numbers, which a CPU is slow at: attention
    that is nearly one-hot is full of them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def train(kind, steps, seed=0, batch=BATCH):
    """Train, once a session; representations are measured every five steps, on 256 tokens."""
    return _train(kind, steps, seed, batch)


@functools.cache
def _train(kind, steps, seed, batch):
    run, hidden = Run(), []
    with quickly(), torch.random.fork_rng(devices=[]):
        model, batches, optimizer = make(kind, seed, batch)
        for block in model.layers:
            block.register_forward_hook(lambda module, args, output: hidden.append(output.detach()))
        for step, (tokens, targets) in zip(range(steps), batches, strict=False):
            hidden.clear()
            loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.losses.append(loss.item())
            run.attention.append({name: value.numpy() for name, value in model.attention().items()})
            if step % 5 == 0:
                sums = [row_sums(states.flatten(0, 1)[::4]) for states in hidden]
                run.representation[step] = {
                    "representation/effective_rank": [effective_rank(s.spectrum).item() for s in sums],
                    "representation/mean_cosine": [mean_cosine(s).item() for s in sums],
                }
    return run
