"""Time, peak memory and gradient error of the loss of a linear head, forward and backward, against its peers.

    python benchmarks/linear_head.py --trained    # all cases of this device, under 15 minutes on two CPU cores
    python benchmarks/linear_head.py --quick      # one small shape, for a smoke test

The data are random numbers and, with ``--trained``, the hidden states of the CPU quickstart's model on held-out text;
it is trained into a cache folder first, which takes two minutes more. Times come from interleaved rounds in one
process; the memory of each contender from a process of its own. Nothing but the machine's own load should run beside
it. ``report.py`` turns the JSON into tables and plots.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import Case
from implementations import IMPLEMENTATIONS, NAIVE, Implementation, LossFunction
from machine import describe, slug
from measuring import interleaved_times, largest_error, relative_error, summary_ms, true_gradients
from torch import Tensor
from trained_head import CACHE, trained_file
from trial import step, trial

from litropy.losses import linear_cross_entropy

RESULTS = Path(__file__).parent / "results"
FLOAT32, BFLOAT16 = "float32", "bfloat16"
# tokens, width, vocabulary, dtype; the last one is the headline
CPU_CASES = [Case(2048, 512, 32768, FLOAT32), Case(2048, 512, 32768, BFLOAT16), Case(1024, 896, 151936, BFLOAT16)]
GPU_CASES = [
    Case(8192, 896, 151936, BFLOAT16),
    Case(8192, 4096, 128256, BFLOAT16),
    Case(16384, 2048, 151936, BFLOAT16),
    Case(8192, 2304, 256000, BFLOAT16),
]
QUICK_CASES = [Case(128, 64, 4096, FLOAT32)]
TRAINED_TOKENS = {"cpu": 4096, "cuda": 16384}
TRAINED_DTYPES = {"cpu": (FLOAT32, BFLOAT16), "cuda": (BFLOAT16,)}
# seconds of a case's timing after which three rounds have to do
PATIENCE = 60.0


def cases(device: str, quick: bool, trained: Path | None) -> list[Case]:
    """What is measured on a device."""
    found = []
    if trained is not None:
        path = trained_file(trained)
        tokens = 512 if quick else TRAINED_TOKENS[device]
        found = [Case.trained(path, tokens, dtype) for dtype in TRAINED_DTYPES[device]]
    return found + (QUICK_CASES if quick else {"cpu": CPU_CASES, "cuda": GPU_CASES}[device])


def reason(error: Exception) -> str:
    """Why a contender cannot run here, in a line."""
    if isinstance(error, ImportError):
        return f"not installed or not importable: {error}"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"


def errors(loss: LossFunction, inputs: tuple[Tensor, Tensor, Tensor], truth: tuple[float, Tensor, Tensor]) -> dict:
    """Errors of loss and gradients against float64."""
    hidden, weight, target = inputs
    true_loss, d_hidden, d_weight = truth
    hidden.grad = weight.grad = None
    value = loss(hidden, weight, target)
    value.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return {
        "loss_error": abs(value.item() - true_loss),
        "input_gradient_error": relative_error(hidden.grad, d_hidden),
        "weight_gradient_error": relative_error(weight.grad, d_weight),
        "input_gradient_largest_error": largest_error(hidden.grad, d_hidden),
        "weight_gradient_largest_error": largest_error(weight.grad, d_weight),
    }


@torch.no_grad()
def skipped(inputs: tuple[Tensor, Tensor, Tensor], skip_tol: float) -> dict[str, float]:
    """What our backward pass leaves out: shares of tiles and of softmax mass."""
    names = ("surviving_share", "skipped_mass")
    _, stats = linear_cross_entropy(*inputs, skip_tol=skip_tol, return_stats=names)
    return {
        "surviving_share": stats.surviving_share.mean().item(),
        "mean_skipped_mass": stats.skipped_mass.mean().item(),
        "largest_skipped_mass": stats.skipped_mass.max().item(),
    }


def run_case(case: Case, contenders: list[Implementation], device: str, rounds: int, limit: float) -> dict[str, Any]:
    """Everything about one problem."""
    losses: dict[str, LossFunction] = {}
    results: dict[str, dict[str, Any]] = {}
    not_run = {}
    for contender in contenders:
        try:
            losses[contender.name] = contender.make()
        except Exception as error:  # whatever keeps a peer from running is part of the result
            not_run[contender.name] = reason(error)
            continue
        if contender.needs_gpu and device != "cuda":
            not_run[contender.name] = "needs a GPU"
            continue
        found = trial(case, contender.name, device, limit)
        if "reason" in found:
            not_run[contender.name] = found["reason"]
        else:
            results[contender.name] = found
    inputs = case.inputs(device)
    truth = true_gradients(*inputs)
    for contender in contenders:
        if contender.name not in results:
            continue
        try:
            results[contender.name] |= errors(losses[contender.name], inputs, truth)  # also warms up
            if contender.skip_tol:
                results[contender.name] |= skipped(inputs, contender.skip_tol)
        except Exception as error:
            del results[contender.name]
            not_run[contender.name] = reason(error)
    del truth
    steps = {name: partial(step, losses[name], inputs) for name in results}
    for name, seconds in interleaved_times(steps, rounds, device, PATIENCE).items():
        result = results[name]
        result |= summary_ms(seconds) | {"rounds": len(seconds)}
        print(f"  {name}: {result['median_ms']:.0f} ms, {result['peak_extra_mib']} MiB", flush=True)
    for name, why in not_run.items():
        print(f"  {name}: not run ({why})", flush=True)
    return {
        **case.record(),
        "results": [{"name": name, **result} for name, result in results.items()],
        "not_run": [{"name": name, "reason": why} for name, why in not_run.items()],
    }


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trained = "also measure a trained model; the folder where it is kept (default: runs/benchmarks)"
    parser.add_argument("--trained", type=Path, nargs="?", const=CACHE, metavar="CACHE", help=trained)
    parser.add_argument("--quick", action="store_true", help="small shapes and two rounds")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of timing")
    parser.add_argument("--limit", type=float, default=90, help="seconds that a contender's trial may take")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: results/linear_head_<machine>.json)")
    return parser.parse_args(argv)


def main() -> None:
    """Measure and write the JSON."""
    os.environ.pop("TRITON_INTERPRET", None)  # kernels that are interpreted are not what anyone runs
    options = arguments()
    device = options.device
    rounds = 2 if options.quick else options.rounds
    machine = describe(device)
    name = f"linear_head_{slug(machine['hardware'])}{'_quick' if options.quick else ''}.json"
    output = options.output or RESULTS / name
    output.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"benchmark": "linear_head", "baseline": NAIVE, "machine": machine, "cases": []}
    for case in cases(device, options.quick, options.trained):
        print(f"{case.record()}", flush=True)
        record["cases"].append(run_case(case, IMPLEMENTATIONS, device, rounds, options.limit))
        output.write_text(json.dumps(record, indent=1) + "\n")  # after each: a slow peer may cost one's patience
    print(f"Wrote {output}")


if __name__ == "__main__":
    main()
