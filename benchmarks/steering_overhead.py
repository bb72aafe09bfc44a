"""What each steering method adds to a training step on verifiable rewards, against GRPO with all methods off.

    python benchmarks/steering_overhead.py            # 7.6 million parameters: about 8 minutes on 2 cores
    python benchmarks/steering_overhead.py --quick    # a tiny model and two rounds, for a smoke test

One run of Lightning, in which steps take turns: GRPO, then some methods as their fragments in ``configs/steering`` fill
the slots, then GRPO again, in another order each round. A step is compared with the GRPO steps before and after it.
A method that is no sampler gets the same responses each time, as it has no part in writing them; samplers write, and
are compared with plain sampling. A reference model has a row of its own, the forward pass that it is there for; what
needs one is compared with GRPO beside it. What is added is given as a share of a whole step (responses, statistics,
two optimiser steps) and of the update alone, which is all but the writing. The process keeps the memory that it frees:
fetching it anew from the system takes a time that varies by more than a method costs.
"""

import argparse
import json
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ActionConfigFile
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from machine import describe, keep_memory, slug
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from litropy.config_files import packaged_configs
from litropy.recipes import RLVR
from litropy.recipes.causal_lm import CausalLM
from litropy.recipes.rlvr_reference import Reference
from litropy.recipes.rlvr_samples import Reward, RewardResult, Sample
from litropy.recipes.rlvr_sampling import Generation, HuggingFaceEngine, RolloutEngine, RolloutRequest
from litropy.recipes.steering.sampler import Sampler

GOAL = 0.03
GRPO = "grpo"
REFERENCE = "reference model"  # GRPO with one, which nothing reads
NEIGHBOURS = 4  # methods between two steps of GRPO
WARM_UP = 4  # steps of GRPO before anything is timed
MODEL = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
# the head's weights grow so many times, so that the policy is as sharp as a trained one: about 1.7 nats of entropy.
# Weights that are large everywhere would saturate attention, whose gradients are then too small for a CPU's fast path
SHARPNESS = 20.0
TINY = MODEL | {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
# what a method takes by its nature, and its slot cannot spare
REASONS = {
    REFERENCE: "a forward pass",
    "data": "more responses in place of those left out, which come on top: here nothing was left out",
}


class Alternating(Reward):
    """Every second response is right, so that each group has something to learn from."""

    def __call__(self, samples: list[Sample], responses: list[str]) -> list[RewardResult]:
        return [RewardResult(float(row % 2), bool(row % 2), response) for row, response in enumerate(responses)]


class Writer(RolloutEngine):
    """Hugging Face's generation, or what it wrote with plain sampling before; measures the writing.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.inner = HuggingFaceEngine()
        self.plain: Generation | None = None
        self.seconds = 0.0
        self.writes = True

    def generate(self, policy: CausalLM, request: RolloutRequest, sampler: Sampler) -> Generation:
        """Write, or repeat."""
        begin = self.clock()
        found = self.plain if not self.writes else None
        if found is None:
            found = self.inner.generate(policy, request, sampler)
        if self.plain is None:
            self.plain = found
        self.seconds = self.clock() - begin
        return found


def steering_fragments(prompts: int, only: list[str] | None = None) -> dict[str, RLVR]:
    """A module for GRPO and for each fragment, or some, without weights; and for a reference model if one needs it."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    base = [
        "--model",
        "RLVR",
        "--model.config",
        json.dumps(MODEL),
        "--model.mini_batch_size",
        str(max(1, prompts // 2)),
    ]
    found = {}
    for path in packaged_configs().values():
        if path.parent.name != "steering" or (only is not None and path.stem not in (GRPO, *only)):
            continue
        words = [*base, "--config", str(path), "--model.epochs", "1"]
        if "data" in yaml.safe_load(path.read_text())["model"]:
            words += ["--model.data.groups", str(prompts)]
        found[path.stem] = parser.instantiate_classes(parser.parse_args(words)).model
    plain = {GRPO: found.pop(GRPO)}
    if any(module.reference_kind != "none" for module in found.values()):
        words = [*base, "--model.reference", "frozen"]
        plain[REFERENCE] = parser.instantiate_classes(parser.parse_args(words)).model
    return {**plain, **found}


def is_sampler(module: RLVR) -> bool:
    """Whether the method takes part in writing the responses."""
    return type(module.sampler) is not Sampler


def compared_with(name: str, modules: dict[str, RLVR]) -> str:
    """What runs before and after a method: GRPO, beside a reference model if the method needs one."""
    return REFERENCE if name != REFERENCE and modules[name].reference_kind != "none" else GRPO


def turns_of(modules: dict[str, RLVR], rounds: int, seed: int = 0) -> list[tuple[str, bool]]:
    """Steps in their order: whose turn it is, and whether responses are written; the first ones warm up."""
    shuffled = random.Random(seed)
    order = [(GRPO, place % 2 == 0) for place in range(WARM_UP)]
    for _ in range(rounds):
        for plain, writes in ((GRPO, True), (GRPO, False), (REFERENCE, False)):
            names = [
                name
                for name, module in modules.items()
                if name != GRPO and is_sampler(module) == writes and compared_with(name, modules) == plain
            ]
            shuffled.shuffle(names)
            for place, name in enumerate(names):
                order += [(plain, writes)] if place % NEIGHBOURS == 0 else []
                order.append((name, writes))
            order += [(plain, writes)] if names or plain == GRPO else []
    return order


class Turns(Callback):
    """Fills the slots for the step that comes; stands first among the callbacks.

    Args:
        order: whose turn it is, and whether responses are written.
        modules: the methods.
        engine: of the module that is trained.
        clock: gives seconds.
    """

    def __init__(
        self, order: list[tuple[str, bool]], modules: dict[str, RLVR], engine: Writer, clock: Callable[[], float]
    ) -> None:
        self.order, self.modules, self.engine, self.clock = order, modules, engine, clock
        self.steps: list[float] = []
        self.updates: list[float] = []
        self.references: dict[str, Reference] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RLVR)
        assert pl_module.causal_lm is not None
        with torch.no_grad():
            pl_module.causal_lm.get_output_embeddings().weight.mul_(SHARPNESS)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, RLVR)
        if not self.references:
            assert pl_module.causal_lm is not None
            self.references = {kind: Reference(kind, pl_module._built) for kind in ("none", "frozen")}
        name, self.engine.writes = self.order[len(self.steps)]
        module = self.modules[name]
        pl_module.methods, pl_module.sampler, pl_module.wanted = module.methods, module.sampler, module.wanted
        pl_module.reference = self.references[module.reference_kind]
        self.begin = self.clock()

    def end_step(self) -> None:
        """Called by the last of the callbacks."""
        self.steps.append(self.clock() - self.begin)
        self.updates.append(self.steps[-1] - self.engine.seconds)


class End(Callback):
    """Stands last among the callbacks."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_batch_end(self, *args: Any) -> None:
        self.turns.end_step()


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of so many numbers, between spaces."""
    vocabulary = {word: place for place, word in enumerate(["<pad>", "<eos>", "<unk>", *map(str, range(size - 3))])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


class Prompts(LightningDataModule):
    """The same prompts in each batch.

    Args:
        vocabulary: size of the tokenizer's.
        prompts: in a batch.
        length: tokens of a prompt.
        batches: how many.
    """

    def __init__(self, vocabulary: int, prompts: int, length: int, batches: int) -> None:
        super().__init__()
        self.tokenizer, self.reward = word_tokenizer(vocabulary), Alternating()
        numbers = random.Random(0)
        words = [" ".join(str(numbers.randrange(vocabulary - 3)) for _ in range(length)) for _ in range(prompts)]
        self.samples = [Sample(text, None, "words", place) for place, text in enumerate(words)]
        self.batches = batches

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of samples."""
        return DataLoader([self.samples] * self.batches, batch_size=None)  # type: ignore[arg-type]


def measure(
    config: dict[str, Any],
    prompts: int,
    group_size: int,
    length: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    only: list[str] | None = None,
) -> dict[str, Any]:
    """Train, and compare the steps.

    Args:
        config: keys of the model.
        prompts: in a batch.
        group_size: responses to each.
        length: tokens of a response; a prompt has a quarter of that.
        rounds: how often each method is timed.
        clock: gives seconds.
        only: names of fragments; None for all.
    """
    seed_everything(0, verbose=False)
    with warnings.catch_warnings():  # what the guard explains is about results, not about time
        warnings.simplefilter("ignore")
        modules = steering_fragments(prompts, only)
        order = turns_of(modules, rounds)
        engine = Writer(clock)
        model = RLVR(
            config=config,
            group_size=group_size,
            max_new_tokens=length,
            mini_batch_size=max(1, prompts // 2),
            micro_batch_size=max(1, prompts * group_size // 4),
            # the policy stays the one that wrote the responses: hundreds of steps on the same ones would lead away from
            # it, and weights that are tiny then make numbers that a CPU is slow with
            learning_rate=1e-12,
            engine=engine,
        )
        turns = Turns(order, modules, engine, clock)
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[turns, End(turns)],
        )
        trainer.fit(model, datamodule=Prompts(config["vocab_size"], prompts, max(1, length // 4), len(order)))
    parameters = sum(parameter.numel() for parameter in model.causal_lm.parameters())
    return {"parameters": parameters, **evaluate(turns, modules, rounds)}


def evaluate(turns: Turns, modules: dict[str, RLVR], rounds: int) -> dict[str, Any]:
    """Medians over rounds of what each method adds to its neighbours' time."""
    places: dict[tuple[str, bool], list[int]] = {}
    for place, turn in enumerate(turns.order[WARM_UP:], WARM_UP):
        places.setdefault(turn, []).append(place)
    plain = [places.get((GRPO, writes), []) for writes in (True, False)]
    step = statistics.median(turns.steps[i] for i in plain[0] or plain[1])
    update = statistics.median(turns.updates[i] for i in plain[0] + plain[1])
    results = []
    for name, module in modules.items():
        if name == GRPO:
            continue
        writes, beside = is_sampler(module), compared_with(name, modules)
        extra = []
        for place in places[name, writes]:
            before = [i for i in places[beside, writes] if place - NEIGHBOURS <= i < place]
            after = [i for i in places[beside, writes] if place < i <= place + NEIGHBOURS]
            if before and after:  # not where a reference model serves as the neighbour of others
                extra.append(turns.steps[place] - (turns.steps[before[-1]] + turns.steps[after[0]]) / 2)
        added = statistics.median(extra)
        error = 1.25 * statistics.stdev(extra) / math.sqrt(len(extra))  # of a median: 1.25 times that of a mean
        kind = "data" if module.methods.data is not None else name
        results.append(
            {
                "name": name,
                "beside": beside,
                "added_ms": round(1e3 * added, 2),
                "error_ms": round(1e3 * error, 2),
                "of_step": round(added / step, 5),
                "of_update": None if writes else round(added / update, 5),
                "reason": REASONS.get(kind),
            }
        )
    return {"step_ms": round(1e3 * step, 1), "update_ms": round(1e3 * update, 1), "results": results}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds")
    parser.add_argument("--rounds", type=int, default=7, help="how often each method is timed, at least 2")
    parser.add_argument("--prompts", type=int, default=4, help="in a batch")
    parser.add_argument("--group-size", type=int, default=8, help="responses to a prompt")
    parser.add_argument("--length", type=int, default=64, help="tokens of a response")
    parser.add_argument("--only", nargs="+", help="fragments to measure, such as siren; all without this")
    parser.add_argument("--processor-time", action="store_true", help="for a machine that others use at the same time")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/steering_overhead_<machine>.json)")
    return parser.parse_args(argv)


def main() -> None:
    """Measure and write the JSON."""
    options = arguments()
    machine = describe("cpu")
    config, rounds, length = (TINY, 2, 8) if options.quick else (MODEL, options.rounds, options.length)
    clock = time.process_time if options.processor_time else time.perf_counter
    record = {
        "benchmark": "steering_overhead",
        "goal": GOAL,
        "model": config,
        "prompts": options.prompts,
        "group_size": options.group_size,
        "length": length,
        "rounds": rounds,
        "clock": clock.__name__,
        "keeps_memory": keep_memory(),
        "how": "added_ms: median over rounds of (step - mean of the steps of `beside` before and after it); error_ms:"
        " its standard error; of_step, of_update: shares of the medians of GRPO's",
        "machine": machine,
        **measure(config, options.prompts, options.group_size, length, rounds, clock, options.only),
    }
    name = f"steering_overhead_{slug(machine['hardware'])}{'_quick' if options.quick else ''}.json"
    output = options.output or Path(__file__).parent / "results" / name
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"A step of GRPO takes {record['step_ms']:,.0f} ms, its update {record['update_ms']:,.0f} ms.")
    for result in record["results"]:
        print(f"  {result['name']}: {result['added_ms']:+.1f} ms, {result['of_step']:+.2%} of a step")
    print(f"Wrote {output}")


if __name__ == "__main__":
    main()
