"""Shared by the tests of RLVR: a model of width 32, a tokenizer of single characters, and sums to a target."""

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from litropy.losses import HeadStats
from litropy.recipes.causal_lm import CausalLM
from litropy.recipes.rlvr_samples import Reward, RewardResult, Sample
from litropy.recipes.rlvr_sampling import Generation, RolloutEngine
from litropy.recipes.steering import ForkingTokens, ReferenceKL, TokenMean
from litropy.recipes.steering.batch import RolloutBatch
from litropy.recipes.steering.states import states

CHARACTERS = "0123456789+= "
CONFIG = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


def tokenizer():
    vocabulary = {token: place for place, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


class SumReward(Reward):
    """Two digits that sum to the target: "3+4" for 7."""

    def __call__(self, samples, responses):
        found = []
        for sample, response in zip(samples, responses, strict=True):
            parts = response.replace(" ", "").split("+")
            right = len(parts) == 2 and all(p.isdigit() and len(p) == 1 for p in parts)
            right = right and sum(map(int, parts)) == sample.spec
            found.append(RewardResult(float(right), right, "+".join(parts) or None))
        return found


class Sums(LightningDataModule):
    """Prompts "7=" in a fixed order; the same number of batches on each rank."""

    def __init__(self, batches=3, size=4, reward=None, rank=0, ranks=1):
        super().__init__()
        self.tokenizer, self.reward = tokenizer(), reward or SumReward()
        self.batches, self.size, self.rank, self.ranks = batches, size, rank, ranks

    def samples(self):
        numbers = [7 * place % 19 for place in range(self.batches * self.size * self.ranks)]
        return [Sample(f"{n}=", n, "sum", place, f"{min(n, 9)}+{n - min(n, 9)}") for place, n in enumerate(numbers)]

    def train_dataloader(self):
        samples = self.samples()[self.rank :: self.ranks]
        batches = [samples[start : start + self.size] for start in range(0, len(samples), self.size)]
        return DataLoader(batches, batch_size=None)

    val_dataloader = train_dataloader


class Metrics(Callback):
    """Keeps what was logged after each batch; may write a checkpoint when responses wait, and end training."""

    def __init__(self, stop=None):
        self.rows, self.stop = [], stop

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        if self.stop is not None and trainer.global_step > 1 and module.methods.data.state_dict()["kept"]:
            trainer.save_checkpoint(self.stop)
            trainer.should_stop = True


def trainer(**options):
    return Trainer(
        **{"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
           "enable_model_summary": False, "use_distributed_sampler": False, "num_sanity_val_steps": 0,
           "devices": 1, "max_epochs": 1} | options
    )  # fmt: skip


def policy(dtype=torch.float32, **keys):
    torch.manual_seed(5)
    config = AutoConfig.for_model(**CONFIG | {"vocab_size": 16, "initializer_range": 0.3} | keys)
    return CausalLM(AutoModelForCausalLM.from_config(config, dtype=dtype)).eval()


def rollouts(groups=4, size=4, width=7, prompt=5, vocabulary=16, reference=True, dtype=torch.float32):
    """Random responses of 0 to ``width`` tokens; some start alike, some rewards of a group are equal."""
    generator = torch.Generator().manual_seed(11)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = groups * size
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    lengths[0], lengths[1], lengths[rows // 2] = 0, width, 1
    mask = torch.arange(width) < lengths[:, None]
    lead = torch.randint(1, prompt + 1, (groups,), generator=generator).repeat_interleave(size)
    prompt_mask = torch.arange(prompt) >= prompt - lead[:, None]
    prompts = torch.randint(3, vocabulary, (groups, prompt), generator=generator).repeat_interleave(size, 0)
    responses = torch.randint(3, vocabulary, (rows, width), generator=generator)
    responses[2:4, :3] = responses[1, :3]
    reward = torch.randint(0, 2, (rows,), generator=generator).to(dtype)
    reward[:size], reward[size] = 1, 0
    reward[size + 1] = 1
    old = (-draw(rows, width).abs() - 0.5) * mask
    return RolloutBatch(
        prompts=prompts * prompt_mask,
        prompt_mask=prompt_mask,
        responses=responses * mask,
        mask=mask,
        behaviour=(old + 0.3 * draw(rows, width)) * mask,
        temperature=torch.where(mask, 1 + 0.1 * draw(rows, width).tanh(), 1),
        row=torch.arange(rows) * 3 + 5,
        group=torch.arange(rows) // size + 9,
        reward=reward,
        correct=reward > 0,
        truncated=torch.zeros(rows, dtype=torch.bool),
        stats=HeadStats(logprob=old, entropy=draw(rows, width).abs() * mask, varentropy=draw(rows, width).abs() * mask),
        reference=(old + 0.2 * draw(rows, width)) * mask if reference else None,
    )


class Scripted(RolloutEngine):
    """Responses that depend on the prompt alone, whatever the rank."""

    def generate(self, policy, request, sampler):
        rows, steps = request.prompts.repeat_interleave(request.group_size, 0), torch.arange(4)
        place = torch.arange(len(rows)) % request.group_size
        responses = 3 + (rows.sum(-1, keepdim=True) + place[:, None] * (steps + 1) + steps**2) % 13
        mask = steps < 1 + place[:, None] % 4
        ones = torch.ones(mask.shape)
        return Generation(responses * mask, mask, -2.0 * mask, ones, torch.zeros(len(rows), dtype=torch.bool))


class Digits(Reward):
    def __call__(self, samples, responses):
        return [RewardResult(float(sum(map(ord, r)) % 5), len(r) > 2, r) for r in responses]


def scripted_run(module_class, data, strategy, ranks, callbacks=(), methods=None, **options):
    """Train with scripted responses; weights and the last metrics."""
    seed_everything(3, verbose=False)
    module = module_class(
        config=CONFIG, pad_vocab_to=1, learning_rate=0.01, eps=1e-2, group_size=4, mini_batch_size=3, epochs=2,
        micro_batch_size=5, engine=Scripted(), reward=Digits(), warm_start_steps=1, reference="frozen",
        masks=[ForkingTokens(0.5)], penalties=[ReferenceKL(0.1)], aggregation=TokenMean(), **(methods or {}),
    )  # fmt: skip
    metrics = Metrics()
    made = trainer(
        devices=ranks, strategy=strategy, callbacks=[*callbacks, metrics], limit_val_batches=0, **options
    )  # fmt: skip
    made.fit(module, datamodule=data)
    weights = {name: value.clone() for name, value in module.model.state_dict().items()}
    return {"weights": weights, "logged": metrics.rows[-1], "states": states(module._components())}
