"""A training step of the quickstart model: our loss against the model's own ``labels=`` loss; time and peak memory.

    python benchmarks/quickstart_step.py            # about 2 minutes on two CPU cores
    python benchmarks/quickstart_step.py --quick    # a tiny batch and two rounds, for a smoke test

A step is forward, backward and AdamW on random tokens of the quickstart's batch size, length and vocabulary. Times come
from interleaved rounds in one process; the memory of each contender from a process of its own.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from machine import describe, slug
from measuring import MIB, interleaved_times, peak_extra_bytes, summary_ms
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from litropy.config_files import find_config
from litropy.recipes.causal_lm import CausalLM
from litropy.recipes.text_data import TextDataModule

CONFIG = "quickstart/pretrain_cpu.yaml"
HUGGING_FACE = "Hugging Face, labels="
STATS = {"litropy": (), "litropy, with entropy and argmax": ("entropy", "argmax")}
CONTENDERS = (*STATS, HUGGING_FACE)


def quickstart_model() -> tuple[nn.Module, int, int]:
    """Build the quickstart's model, with its batch size and sequence length."""
    config = yaml.safe_load(find_config(CONFIG).read_text())
    data = TextDataModule(**config["data"])
    keys = {"vocab_size": data.trained_vocab_size, **config["model"]["config"]}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(keys.pop("model_type"), **keys))
    return model, data.batch_size, data.sequence_length


def training_step(name: str, quick: bool = False) -> Callable[[], Tensor]:
    """Build model and optimiser, and return a function that does one step and returns its loss."""
    model, rows, length = quickstart_model()
    if quick:
        rows, length = 2, 32
    ids = torch.randint(model.config.vocab_size, (rows, length))
    positions = torch.arange(length).expand(rows, length)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    wrapped = CausalLM(model)

    def step() -> Tensor:
        if name == HUGGING_FACE:
            loss = model(**batch, use_cache=False).loss
        else:
            loss = wrapped(batch, return_stats=STATS[name]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def measure_memory(name: str) -> None:
    """The child: print peak memory beyond parameters and optimiser state, in MiB."""
    training_step(name, quick=True)()  # loads libraries and the matrix product's own scratch
    step = training_step(name)
    step()  # makes the optimiser's state
    print(json.dumps({"peak_extra_mib": round(peak_extra_bytes(step, "cpu") / MIB, 1)}))


def memory_in_child(name: str) -> dict[str, Any]:
    """Run this script again to measure one contender's peak memory."""
    child = subprocess.run([sys.executable, __file__, "--measure-memory", name], capture_output=True, text=True)
    if child.returncode:
        return {"peak_extra_mib": None, "peak_extra_reason": child.stderr.strip().splitlines()[-1][:200]}
    return json.loads(child.stdout.splitlines()[-1])


def run(rounds: int, quick: bool) -> dict[str, Any]:
    """Measure all contenders."""
    steps = {name: training_step(name, quick) for name in CONTENDERS}
    interleaved_times(steps, 2, "cpu")  # warm-up
    times = interleaved_times(steps, rounds, "cpu")
    results = []
    for name in CONTENDERS:
        result = {"name": name, **summary_ms(times[name]), **memory_in_child(name)}
        print(f"  {name}: {result['median_ms']:.0f} ms, {result['peak_extra_mib']} MiB", flush=True)
        results.append(result)
    model, rows, length = quickstart_model()
    return {
        "config": CONFIG,
        "batch_size": rows,
        "sequence_length": length,
        "vocabulary": model.config.vocab_size,
        "parameters": model.num_parameters(),
        "results": results,
    }


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny batch and two rounds")
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds of timing")
    parser.add_argument(
        "--output", type=Path, help="JSON file to write (default: results/quickstart_step_<machine>.json)"
    )
    parser.add_argument("--measure-memory", metavar="NAME", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    """Measure and write the JSON."""
    options = arguments()
    if options.measure_memory:
        measure_memory(options.measure_memory)
        return
    machine = describe("cpu")
    rounds = 2 if options.quick else options.rounds
    case = run(rounds, options.quick)
    name = f"quickstart_step_{slug(machine['hardware'])}{'_quick' if options.quick else ''}.json"
    output = options.output or Path(__file__).parent / "results" / name
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {"benchmark": "quickstart_step", "baseline": HUGGING_FACE, "rounds": rounds, "machine": machine, **case}
    output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"Wrote {output}")


if __name__ == "__main__":
    main()
