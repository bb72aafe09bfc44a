"""Does steering hold a policy's entropy up, and what is it good for? Every method, on two tasks that collapse.

    python benchmarks/steering.py                             # everything, within half an hour on an idle core
    python benchmarks/steering.py --tasks tabular             # one task; --methods grpo steer: some methods
    python benchmarks/steering.py --quick                     # a few batches of three methods: does everything run?

Both tasks ask for two digits that sum to a target (``SumToTarget``): 19 prompts with 1 to 10 right answers each.
``tabular`` is a table of logits, trained by gradient descent with the package's methods. ``transformer`` is a model of
two layers, trained by ``RLVR`` in a Lightning Trainer after a supervised phase, from which all methods of a seed start.

The methods are the fragments of ``configs/steering/``, put over a plain GRPO run as the command line does it; names
that end in ``-here`` have numbers for tasks of this size. Accuracy and distinct-correct@16 are exact: they come from
the probabilities of all right answers. The file is written after each run; a run that is in it already is not made
again, so that what was interrupted goes on, unless ``--fresh`` is given.
"""

import argparse
import json
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import steering_tables
import steering_tabular
import steering_transformer
import torch
from collapse import write
from machine import describe, slug
from steering_methods import BASELINE, all_methods, described
from steering_record import K

RESULTS = Path(__file__).parent / "results"
TASKS = {"tabular": steering_tabular, "transformer": steering_transformer}
METHODS = all_methods()
_QUICK = (BASELINE, "entropy_target", "forking_tokens")

Record = dict[str, Any]
Plan = tuple[str, str, int, int]


def planned(tasks: Sequence[str], methods: Sequence[str], seeds: int, share: float = 1.0) -> list[Plan]:
    """Task, method, seed and batches of the runs, the first seed of all before the second."""
    return [
        (task, method, seed, max(1, round(TASKS[task].BATCHES * share)))
        for seed in range(seeds)
        for task in tasks
        for method in methods
    ]


def still_true(record: Record, methods: Record) -> dict[Plan, Record]:
    """The runs of a record by their plans, without those of methods that have other numbers now."""
    before = record.get("methods", {})
    return {
        (run["task"], run["method"], run["seed"], run["batches"]): run
        for run in record["runs"]
        if before[run["task"]][run["method"]] == methods[run["task"]].get(run["method"])
    }


def run(task: str, method: str, seed: int, batches: int) -> Record:
    """Train one policy; its curves, and the processor time it took."""
    begun = time.process_time()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        curves = TASKS[task].run(METHODS[method], seed, batches)
    seconds = round(time.process_time() - begun, 1)
    plan = {"task": task, "method": method, "seed": seed, "batches": batches}
    return {**plan, "curves": curves, "cpu_seconds": seconds}


def _announce(done: Record, number: int, of: int, seconds: float) -> None:
    curves = done["curves"]
    print(
        f"{number}/{of} {done['task']}, {done['method']}, seed {done['seed']}: entropy {curves['entropy'][0]:.2f} to"
        f" {curves['entropy'][-1]:.2f}, pass@1 {curves['pass_at_1'][-1]:.2f}, distinct-correct@{K}"
        f" {curves['distinct_correct'][-1]:.2f}; about {seconds / number * (of - number) / 60:.0f} min left",
        flush=True,
    )


def main() -> None:
    """Make the runs that are missing, write the JSON, and say what was reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="which tasks (default: both)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method on each task (default: 3)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the batches, one seed, three methods")
    parser.add_argument("--fresh", action="store_true", help="make runs again that the file has")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/steering_methods_<machine>.json)")
    options = parser.parse_args()
    share = 0.1 if options.quick else 1.0
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    machine = describe("cpu")
    path = options.output or RESULTS / f"steering_methods_{slug(machine['hardware'])}{'_quick' * options.quick}.json"
    record: Record = json.loads(path.read_text()) if path.exists() else {"runs": []}
    names = options.methods or (_QUICK if options.quick else list(METHODS))
    plans = planned(options.tasks, names, 1 if options.quick else options.seeds, share)
    methods = {task: described(METHODS, task) for task in TASKS}
    runs = still_true(record, methods)
    missing = [plan for plan in plans if options.fresh or plan not in runs]
    print(f"{len(missing)} of {len(plans)} runs to make.", flush=True)
    head = {
        "benchmark": "steering",
        "machine": machine,
        "k": K,
        "seeds": max(options.seeds, record.get("seeds", 0)),
        "batches": {task: batches for task, _, _, batches in planned(list(TASKS), [BASELINE], 1, share)},
        "methods": methods,
    }
    begun = time.perf_counter()
    for number, plan in enumerate(missing, 1):
        done = runs[plan] = {**run(*plan), "commit": machine["commit"]}
        write(path, {**head, "runs": [runs[key] for key in sorted(runs, key=_order)]})
        _announce(done, number, len(missing), time.perf_counter() - begun)
    print(f"Wrote {path}\n\n{steering_tables.facts_table(json.loads(path.read_text()))}")


def _order(key: tuple[Any, ...]) -> tuple[Any, ...]:
    task, method, *rest = key
    return list(TASKS).index(task), list(METHODS).index(method), *rest


if __name__ == "__main__":
    main()
