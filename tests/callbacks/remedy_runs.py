"""A tiny language model that collapses at a high learning rate: what remedies are tested on."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig

from litropy.callbacks.collapse_alarm import Alarm

V = T = D = 64
HEADS = 4
HEALTHY, COLLAPSING = 3e-3, 3e-2


class Markov:
    """Batches of a fixed random Markov chain, each a function of its index; knows where to go on."""

    def __init__(self, batch=8, parts=(0,), stride=1):
        self.batch, self.parts, self.stride, self.position = batch, parts, stride, 0
        chain = np.random.default_rng(0).dirichlet(np.full(V, 0.1), V)
        self.cumulative = torch.tensor(chain).cumsum(1)

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        tokens = [torch.randint(V, (self.batch,), generator=generator)]
        for draw in torch.rand(T - 1, self.batch, 1, generator=generator, dtype=torch.float64):
            tokens.append(torch.searchsorted(self.cumulative[tokens[-1]], draw)[:, 0].clamp(max=V - 1))
        return {"input_ids": torch.stack(tokens, 1)}

    def __len__(self):  # Lightning fetches a batch ahead where it does not know the length
        return 10_000

    def __iter__(self):
        while True:
            first = self.position
            self.position += self.stride
            yield {"input_ids": torch.cat([self[first + part]["input_ids"] for part in self.parts])}

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def tiny_opt(layers=2, seed=0):
    """Decoder with learned positions, norms before blocks, weights of variance 1 / fan-in: collapses at 0.03."""
    config = OPTConfig(
        vocab_size=V,
        hidden_size=D,
        word_embed_proj_dim=D,
        ffn_dim=4 * D,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        max_position_embeddings=T,
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
            elif isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=D**-0.5)
    return model.train()


class TinyLM(LightningModule):
    """Trains it with Adam at a constant rate, without warm-up, decay and clipping."""

    def __init__(self, learning_rate, model=None, eps=1e-8):
        super().__init__()
        self.eps = eps
        self.model = tiny_opt() if model is None else model
        self.learning_rate = learning_rate
        self.losses = []

    def training_step(self, batch, batch_idx):
        ids = batch["input_ids"]
        logits = self.model(ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.learning_rate, betas=(0.9, 0.95), eps=self.eps)


CRITICAL = Alarm(0, 2, "attention_entropy", 0, 0, "")


class Alarms(Callback):
    """Stands for the detector: lets its actions act at some steps."""

    def __init__(self, actions, steps, alarm=CRITICAL):
        self.actions, self.steps, self.alarm = actions, steps, alarm

    def setup(self, trainer, module, stage):
        trainer.callbacks.extend(self.actions)

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step - 1 in self.steps:
            for action in self.actions:
                action.act(self.alarm, trainer, module)


def make_trainer(callbacks, steps, **options):
    options = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "logger": False} | options
    return Trainer(
        callbacks=callbacks,
        max_steps=steps,
        max_epochs=-1,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )


def train(learning_rate, callbacks, steps, module=None, ckpt_path=None, batch=8, data=None, **options):
    """Train; returns module and trainer."""
    module = TinyLM(learning_rate) if module is None else module
    trainer = make_trainer(list(callbacks), steps, **options)
    trainer.fit(module, data or Markov(batch), ckpt_path=ckpt_path)
    return module, trainer


def end_loss(module, steps=10):
    return float(np.mean(module.losses[-steps:]))


@torch.no_grad()
def attention_entropy_by_head(model, seed=10_000):
    """Normalised attention entropy [layers, heads], from stored probabilities, over rows with 8 keys or more."""
    ids = Markov()[seed]["input_ids"]
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    attentions = model(ids, output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    keys = torch.arange(1, T + 1).double().log()
    rows = [-torch.xlogy(p.double(), p.double()).sum(-1)[..., 7:] / keys[7:] for p in attentions]
    return torch.stack([row.mean((0, 2)) for row in rows])
