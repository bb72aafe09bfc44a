"""Real collapses of tiny models: when the alarm comes, when the loss shows it, and what remedies do.

    python benchmarks/collapse.py                           # everything: 25,000 steps of 50 ms on an idle core
    python benchmarks/collapse.py --only collapse recovery  # some scenarios; --help has their names
    python benchmarks/collapse.py --seeds 1 --steps 0.2     # one seed, a fifth of the steps

Each run is a Lightning Trainer with a decoder of up to four layers of width 64, Adam, a constant learning rate, and the
monitors and the detector as they are by default. The file is written after each run; a run that is in it already is not
made again, so that what was interrupted goes on, unless ``--fresh`` is given.

What is recorded counts optimiser steps that are done:

- ``raised`` of an alarm: when the detector raises it, some ten steps after ``step``, the step whose numbers it saw;
- ``loss_shows``: when the loss alone would tell, to somebody who has no healthy run to compare it with. It is not
  finite, or it spikes (the detector's own rule: the median of five losses is far above that of the twenty before), or
  it stalls (the mean of the last 20 is less than 1 % under the mean of the 20 before them);
- ``behind``: when the mean of the last 20 losses is first 0.1 nats above that of the healthy run of the same seed on
  the same batches, which only somebody with that run could know.

The lead time of a run is ``loss_shows`` less the step at which its first alarm was raised.
"""

import argparse
import json
import logging
import multiprocessing
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from collapse_models import TinyLM, batches, labels_of, sequences, tiny_decoder
from collapse_record import EVERY, AlarmTimes, Recorder, loss_shows, means
from collapse_scenarios import SCENARIOS, described
from lightning.pytorch import Trainer
from machine import commit, describe, slug

from litropy.callbacks import (
    AttentionEntropyMonitor,
    CollapseDetector,
    OutputEntropyMonitor,
    RepresentationCollapseMonitor,
)

RESULTS = Path(__file__).parent / "results"
HELD_OUT_SEQUENCES, HELD_OUT_PART = 32, 1
_LAST = 20

Record = dict[str, Any]


@contextmanager
def _quickly() -> Iterator[None]:
    """One thread, the fastest for such models, and no subnormal numbers, which one-hot attention has and CPUs hate."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def run(name: str, seed: int, steps: int) -> Record:
    """Train one model, and say what happened."""
    scenario = SCENARIOS[name]
    times = AlarmTimes()
    monitors = [
        AttentionEntropyMonitor(heatmap_every_n_steps=0),
        OutputEntropyMonitor(),
        RepresentationCollapseMonitor(),
    ]
    with _quickly(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detector = CollapseDetector(actions=[times, *scenario.actions()])
        held_out = sequences(scenario.task, seed, HELD_OUT_SEQUENCES, HELD_OUT_PART)
        recorder = Recorder((held_out, labels_of(held_out, scenario.task)), EVERY)
        model = tiny_decoder(seed, scenario.layers, scenario.post_ln, scenario.sharp)
        module = TinyLM(model, scenario.learning_rate)
        start = time.perf_counter()
        _trainer([*monitors, detector, recorder, *scenario.callbacks()], steps).fit(
            module, batches(scenario.task, seed, steps)
        )
    for alarm in detector.alarms[len(times.alarms) :]:  # those that come when training ends act on nothing
        times.note(alarm, steps)
    return {
        "scenario": name,
        "seed": seed,
        "steps": steps,
        "alarms": times.first_of_each_rule(),
        "number_of_alarms": len(times.alarms),
        "loss_shows": loss_shows(module.losses),
        "end": {"train_loss": round(sum(module.losses[-_LAST:]) / len(module.losses[-_LAST:]), 4)}
        | {curve: values[-1] for curve, values in recorder.curves.items() if curve != "step"},
        "train_loss": means(module.losses, EVERY),
        "curves": recorder.curves,
        "seconds": round(time.perf_counter() - start, 1),
        "commit": commit(),
    }


def _trainer(callbacks: list[Any], steps: int) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def planned(names: Sequence[str], scenarios: Record) -> list[tuple[str, int, int]]:
    """Names, seeds and steps of the runs, the first seeds of all before the second ones."""
    runs = [(name, seed, scenarios[name]["steps"]) for name in names for seed in range(scenarios[name]["seeds"])]
    return sorted(runs, key=lambda run: run[1])


def write(path: Path, record: Record) -> None:
    """Write a record, one run a line; a run that is interrupted meanwhile leaves the file as it was."""
    head = json.dumps({key: value for key, value in record.items() if key != "runs"}, indent=1)
    lines = ",\n".join(json.dumps(run) for run in record["runs"])
    temporary = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(f'{head[:-2]},\n "runs": [\n{lines}\n]\n}}\n')
    temporary.replace(path)


def _announce(done: Record, number: int, of: int) -> None:
    first = next((f"{a['rule']} at step {a['raised']}" for a in done["alarms"]), "no alarm")
    print(
        f"{number}/{of} {done['scenario']}, seed {done['seed']}: {first}; the loss shows it at {done['loss_shows']};"
        f" end: loss {done['end']['train_loss']:.3f}, attention entropy {done['end']['entropy']:.2f};"
        f" {done['seconds']:.0f} s",
        flush=True,
    )


def _run_planned(plan: tuple[str, int, int]) -> Record:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return run(*plan)


def main() -> None:
    """Make the runs that are missing, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, metavar="NAME", help=f"of {', '.join(SCENARIOS)}")
    parser.add_argument("--seeds", type=int, help="seeds of each scenario (default: 3, and 10 of healthy)")
    parser.add_argument("--steps", type=float, default=1.0, help="factor of the steps of each run")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, each on one thread")
    parser.add_argument("--fresh", action="store_true", help="make runs again that the file has")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/collapse_<machine>.json)")
    options = parser.parse_args()
    machine = describe("cpu") | {"threads": 1}
    path = options.output or RESULTS / f"collapse_{slug(machine['hardware'])}.json"
    record: Record = json.loads(path.read_text()) if path.exists() else {"benchmark": "collapse", "runs": []}
    steps = {name: max(1, round(scenario.steps * options.steps)) for name, scenario in SCENARIOS.items()}
    scenarios = described(steps, options.seeds)
    plans = planned(options.only or list(SCENARIOS), scenarios)
    runs = {(run["scenario"], run["seed"], run["steps"]): run for run in record["runs"]}
    missing = [plan for plan in plans if options.fresh or plan not in runs]
    print(f"{len(missing)} of {len(plans)} runs to make, {sum(plan[2] for plan in missing)} steps.", flush=True)
    with multiprocessing.get_context("spawn").Pool(options.processes) if options.processes > 1 else _here() as pool:
        for number, done in enumerate(pool.imap_unordered(_run_planned, missing), 1):
            runs[done["scenario"], done["seed"], done["steps"]] = done
            order = sorted(runs.values(), key=lambda run: (list(SCENARIOS).index(run["scenario"]), run["seed"]))
            head = {"benchmark": "collapse", "machine": machine, "every_n_steps": EVERY, "scenarios": scenarios}
            write(path, {**head, "runs": order})
            _announce(done, number, len(missing))
    print(f"Wrote {path}")


@contextmanager
def _here() -> Iterator[Any]:
    """Stands for a pool of no processes."""

    class Here:
        imap_unordered = staticmethod(map)

    yield Here


if __name__ == "__main__":
    main()
