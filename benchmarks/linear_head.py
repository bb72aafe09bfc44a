"""Time, peak memory and gradient error of the loss of a linear head, forward and backward, against its peers.

    python benchmarks/linear_head.py            # every shape of this device, about 20 minutes on two CPU cores
    python benchmarks/linear_head.py --quick    # one small shape, for a smoke test

Times come from interleaved rounds in one process; the memory of each contender from a process of its own. Nothing but
the machine's own load should run beside it. ``report.py`` turns the JSON into tables and plots.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from implementations import IMPLEMENTATIONS, NAIVE, Implementation, LossFunction, named
from machine import describe, slug
from measuring import (
    MIB,
    Case,
    interleaved_times,
    largest_error,
    peak_extra_bytes,
    relative_error,
    summary_ms,
    true_gradients,
)
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
CPU_SHAPES = [(2048, 512, 32768), (1024, 896, 151936)]
GPU_SHAPES = [(8192, 2304, 256000), (8192, 4096, 128256), (16384, 2048, 151936), (8192, 896, 151936)]
QUICK_SHAPES = [(128, 64, 4096)]
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}


def step(loss: LossFunction, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Forward and backward, leaving fresh gradients."""
    hidden, weight, target = inputs
    hidden.grad = weight.grad = None
    loss(hidden, weight, target).backward()


def reason(error: Exception) -> str:
    """Why a contender cannot run here, in a line."""
    if isinstance(error, ImportError):
        return f"not installed or not importable: {error}"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"


def memory_in_child(case: Case, name: str, device: str) -> dict[str, Any]:
    """Run this script again to measure one contender's peak memory."""
    request = json.dumps({"case": asdict(case), "name": name, "device": device})
    child = subprocess.run(
        [sys.executable, __file__, "--measure-memory", request], capture_output=True, text=True, check=False
    )
    if child.returncode:
        last_line = (child.stderr.strip().splitlines() or ["no output"])[-1]
        return {"peak_extra_mib": None, "peak_extra_reason": last_line[:200]}
    return json.loads(child.stdout.splitlines()[-1])


def measure_memory(request: str) -> None:
    """The child: print peak memory beyond inputs and gradients, in MiB."""
    asked = json.loads(request)
    case, device, contender = Case(**asked["case"]), asked["device"], named(asked["name"])
    loss = contender.make()
    small = Case(64, case.width, 128, case.dtype)  # loads libraries and the matrix product's own scratch
    step(loss, (case if contender.compiles else small).inputs(device))
    inputs = case.inputs(device)
    extra = peak_extra_bytes(partial(step, loss, inputs), device)
    gradients = sum(x.numel() * x.element_size() for x in inputs[:2])
    print(json.dumps({"peak_extra_mib": round(max(0, extra - gradients) / MIB, 1)}))


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


def run_case(case: Case, contenders: list[Implementation], device: str, rounds: int) -> dict[str, Any]:
    """Everything about one problem."""
    inputs = case.inputs(device)
    truth = true_gradients(*inputs)
    losses: dict[str, LossFunction] = {}
    results: dict[str, dict[str, Any]] = {}
    not_run = []
    for contender in contenders:
        try:
            losses[contender.name] = contender.make()
            results[contender.name] = errors(losses[contender.name], inputs, truth)  # also warms up
        except Exception as error:  # whatever keeps a peer from running is part of the result
            losses.pop(contender.name, None)
            not_run.append({"name": contender.name, "reason": reason(error)})
    del truth
    times = interleaved_times({name: partial(step, loss, inputs) for name, loss in losses.items()}, rounds, device)
    inputs[0].grad = inputs[1].grad = None
    for name, result in results.items():
        result |= summary_ms(times[name]) | memory_in_child(case, name, device)
        print(f"  {name}: {result['median_ms']:.0f} ms, {result['peak_extra_mib']} MiB", flush=True)
    for missing in not_run:
        print(f"  {missing['name']}: not run ({missing['reason']})", flush=True)
    return {
        **asdict(case),
        "results": [{"name": name, **result} for name, result in results.items()],
        "not_run": not_run,
    }


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small shape and two rounds")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds of timing")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: results/linear_head_<machine>.json)")
    parser.add_argument("--measure-memory", metavar="JSON", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    """Measure and write the JSON."""
    os.environ.pop("TRITON_INTERPRET", None)  # kernels that are interpreted are not what anyone runs
    options = arguments()
    if options.measure_memory:
        measure_memory(options.measure_memory)
        return
    device = options.device
    shapes = QUICK_SHAPES if options.quick else {"cpu": CPU_SHAPES, "cuda": GPU_SHAPES}[device]
    rounds = 2 if options.quick else options.rounds
    machine = describe(device)
    name = f"linear_head_{slug(machine['hardware'])}{'_quick' if options.quick else ''}.json"
    output = options.output or RESULTS / name
    output.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"benchmark": "linear_head", "baseline": NAIVE, "rounds": rounds, "machine": machine}
    record["cases"] = []
    for shape in shapes:
        for dtype in DTYPES[device]:
            case = Case(*shape, dtype)
            print(f"{case}", flush=True)
            record["cases"].append(run_case(case, IMPLEMENTATIONS, device, rounds))
            output.write_text(json.dumps(record, indent=1) + "\n")  # after each: a slow peer may cost one's patience
    print(f"Wrote {output}")


if __name__ == "__main__":
    main()
