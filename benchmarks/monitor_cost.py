"""What the monitors add to a training step of a causal language model with 124 million parameters.

    python benchmarks/monitor_cost.py            # GPT-2 from its config with random weights: under 4 minutes on 2 cores
    python benchmarks/monitor_cost.py --quick    # a tiny model and three rounds, for a smoke test

One run of Lightning, in which each step is watched by nobody, by one monitor that probes, or by all of them; steps take
turns, so that a noisy moment hits everyone alike. A probed step is compared with the unwatched step of the same round.
Between probes nothing is hooked, so what a monitor costs there is the time inside its callback. Both are weighed by the
monitor's default schedule after its dense phase. A heat-map is timed alone. Memory: one more round.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from machine import describe, slug
from measuring import MIB, watch_peak
from torch.utils.data import DataLoader

from litropy.callbacks import (
    AttentionEntropyMonitor,
    CollapseDetector,
    OutputEntropyMonitor,
    RepresentationCollapseMonitor,
)
from litropy.callbacks.attention_records import draw_heatmap
from litropy.recipes import LanguageModel

GOAL = 0.01
NEVER = 10**9
GPT2 = {"model_type": "gpt2", "vocab_size": 50257}
TINY = {"model_type": "gpt2", "vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
MONITORS: dict[str, Callable[[], Any]] = {
    "AttentionEntropyMonitor": AttentionEntropyMonitor,
    "OutputEntropyMonitor": OutputEntropyMonitor,
    "RepresentationCollapseMonitor": RepresentationCollapseMonitor,
    "CollapseDetector": CollapseDetector,
}
PLAIN, ALL = "no monitor", "all of them"


def schedule_of(monitor: Any) -> Any:
    """What holds ``every_n_steps``."""
    return getattr(monitor, "schedule", monitor)


class Turns(Callback):
    """Says whose turn a step is, and measures the step; stands first among the callbacks.

    Args:
        order: for each step: who watches it, whether they probe, and whether its memory is measured, not its time.
    """

    def __init__(self, order: list[tuple[str, bool, bool]]) -> None:
        self.order = order
        self.step = -1
        self.seconds: list[float] = []
        self.peaks: dict[str, int] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.step = trainer.global_step
        self.hooks = 0.0
        self.peak = watch_peak("cpu") if self.order[self.step][2] else None
        self.begin = time.perf_counter()

    def end_step(self) -> None:
        """Called by the last of the callbacks."""
        self.seconds.append(time.perf_counter() - self.begin)
        if self.peak is not None:
            self.peaks[self.order[self.step][0]] = self.peak()

    def is_on(self, name: str) -> bool:
        """Whether a monitor takes part in this step."""
        return self.step >= 0 and self.order[self.step][0] in (name, ALL)


class End(Callback):
    """Stands last among the callbacks."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.turns.end_step()


class Gate(Callback):
    """Passes a monitor's hooks on in the steps that are its turn, and adds up the time inside of them."""

    def __init__(self, name: str, monitor: Any, turns: Turns) -> None:
        self.name, self.monitor, self.turns = name, monitor, turns
        self.in_hooks: dict[int, float] = {}
        if hasattr(monitor, "collapse_readings"):
            self.collapse_readings = monitor.collapse_readings
        for hook in ("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end"):
            setattr(self, hook, self._passing(getattr(monitor, hook)))
        for hook in ("setup", "on_train_start", "on_train_end"):
            setattr(self, hook, getattr(monitor, hook))

    def on_train_batch_start(self, *arguments: Any) -> None:
        # a turn comes with a probe or without, whatever the number of the step
        probes = self.turns.order[self.turns.step][1]
        schedule_of(self.monitor).every_n_steps = 1 if probes else NEVER
        self._passing(self.monitor.on_train_batch_start)(*arguments)

    def _passing(self, hook: Callable[..., Any]) -> Callable[..., None]:
        def timed(*arguments: Any) -> None:
            if self.turns.is_on(self.name):
                begin = time.perf_counter()
                hook(*arguments)
                step = self.turns.step
                self.in_hooks[step] = self.in_hooks.get(step, 0.0) + time.perf_counter() - begin

        return timed


def turns_of(rounds: int) -> list[tuple[str, bool, bool]]:
    """Steps in their order: a round of warm-up, those that are timed, three without probes, a round for memory."""
    everyone = (PLAIN, *MONITORS, ALL)
    order = [(name, True, False) for _ in range(1 + rounds) for name in everyone] + 3 * [(ALL, False, False)]
    # memory that the first of them has freed is there for the others alike
    return order + [(name, True, True) for name in (ALL, *everyone)]


def measure(config: dict[str, Any], rows: int, length: int, rounds: int) -> dict[str, Any]:
    """Train, and compare the steps.

    Args:
        config: keys of the model.
        rows: sequences in a batch.
        length: tokens in a sequence.
        rounds: how often each kind of step is timed.
    """
    seed_everything(0, verbose=False)
    order = turns_of(rounds)
    ids = torch.randint(config["vocab_size"], (rows, length))
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(length).expand(rows, length)}
    monitors = {name: make() for name, make in MONITORS.items()}
    every = {name: schedule_of(monitor).every_n_steps for name, monitor in monitors.items()}
    for monitor in monitors.values():
        if hasattr(schedule_of(monitor), "dense_steps"):
            schedule_of(monitor).dense_steps = 0
    turns = Turns(order)
    gates = {name: Gate(name, monitor, turns) for name, monitor in monitors.items()}
    model = LanguageModel(config=config, check_parity=False, schedule="constant")
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=len(order),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[turns, *gates.values(), End(turns)],
    )
    trainer.fit(model, DataLoader([batch] * len(order), batch_size=None))  # type: ignore[arg-type]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    layers, heads = model.causal_lm.config.num_hidden_layers, model.causal_lm.config.num_attention_heads
    heatmap_ms = 1e3 * min(_timed_heatmap(layers, heads) for _ in range(2))
    return {"parameters": parameters, **evaluate(turns, gates, every, rounds), "heatmap_ms": round(heatmap_ms, 1)}


def _timed_heatmap(layers: int, heads: int) -> float:
    begin = time.perf_counter()
    draw_heatmap(0, [f"layer_{index}" for index in range(layers)], *np.random.default_rng(0).random((2, layers, heads)))
    return time.perf_counter() - begin


def evaluate(turns: Turns, gates: dict[str, Gate], every: dict[str, int], rounds: int) -> dict[str, Any]:
    """Medians of what each monitor adds, and that weighed by how often it does."""
    size = len(gates) + 2
    timed = range(size, (1 + rounds) * size)
    seconds = {name: [turns.seconds[i] for i in timed if turns.order[i][0] == name] for name in (PLAIN, *gates, ALL)}
    plain = statistics.median(seconds[PLAIN])
    results, total = [], 0.0
    for name in (*gates, ALL):
        extra = [with_ - without for with_, without in zip(seconds[name], seconds[PLAIN], strict=True)]
        result = {
            "name": name,
            "probe_extra_ms": round(1e3 * statistics.median(extra), 2),
            # of a median: 1.25 times that of a mean
            "probe_extra_error_ms": round(1.25e3 * statistics.stdev(extra) / math.sqrt(rounds), 2),
            "peak_extra_mib": round((turns.peaks[name] - turns.peaks[PLAIN]) / MIB, 1),
        }
        if name != ALL:
            idle = [t for step, t in gates[name].in_hooks.items() if not turns.order[step][1]]
            between = statistics.median(idle)
            share = 1 / every[name]
            amortised = share * max(0.0, statistics.median(extra)) + (1 - share) * between
            total += amortised
            result |= {"every_n_steps": every[name], "between_probes_ms": round(1e3 * between, 3)}
            result["probe_hooks_ms"] = round(1e3 * _median_in(gates[name], timed, name, turns), 2)
        else:
            amortised = total
        result |= {"amortised_ms": round(1e3 * amortised, 3), "amortised_share": round(amortised / plain, 6)}
        results.append(result)
    return {"step_ms": round(1e3 * plain, 1), "results": results}


def _median_in(gate: Gate, timed: range, name: str, turns: Turns) -> float:
    return statistics.median(gate.in_hooks[i] for i in timed if turns.order[i][0] == name)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and three rounds")
    parser.add_argument("--rounds", type=int, default=5, help="how often each kind of step is timed, at least 2")
    parser.add_argument("--batch-size", type=int, default=2, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: results/monitor_cost_<machine>.json)")
    return parser.parse_args(argv)


def main() -> None:
    """Measure and write the JSON."""
    options = arguments()
    machine = describe("cpu")
    rounds, length = (3, 32) if options.quick else (options.rounds, options.length)
    record = {
        "benchmark": "monitor_cost",
        "goal": GOAL,
        "model": "gpt2",
        "batch_size": options.batch_size,
        "sequence_length": length,
        "rounds": rounds,
        "how": "probe_extra_ms: median over rounds of (probed step - unwatched step of the same round);"
        " between_probes_ms: time inside the callback at a step without a probe; amortised_ms = probe_extra_ms / n +"
        " between_probes_ms (1 - 1 / n), n = every_n_steps, the default after the dense phase",
        "machine": machine,
        **measure(TINY if options.quick else GPT2, options.batch_size, length, rounds),
    }
    name = f"monitor_cost_{slug(machine['hardware'])}{'_quick' if options.quick else ''}.json"
    output = options.output or Path(__file__).parent / "results" / name
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"A step takes {record['step_ms']:,.0f} ms.")
    for result in record["results"]:
        name, probe, share = result["name"], result["probe_extra_ms"], result["amortised_share"]
        print(f"  {name}: + {probe:.1f} ms at a probe, amortised {share:.3%}, {result['peak_extra_mib']} MiB")
    print(f"Wrote {output}")


if __name__ == "__main__":
    main()
