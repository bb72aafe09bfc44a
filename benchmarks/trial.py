"""One forward and backward pass of one contender in a process of its own: its peak memory, and whether it gets through.

A contender that crashes, or that takes longer than it may, spoils nothing but its own result.
"""

import json
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from cases import Case
from implementations import LossFunction, named
from measuring import MIB, peak_extra_bytes
from torch import Tensor


def step(loss: LossFunction, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Forward and backward, leaving fresh gradients."""
    hidden, weight, target = inputs
    hidden.grad = weight.grad = None
    loss(hidden, weight, target).backward()


def trial(case: Case, name: str, device: str, limit: float) -> dict[str, Any]:
    """Peak memory beyond inputs and gradients [MiB], or the reason why there is none.

    Args:
        case: the problem.
        name: of an implementation.
        device: where to run.
        limit: seconds that it may take: to start, to make the inputs, to warm up and to run once.
    """
    request = json.dumps({"case": asdict(case), "name": name, "device": device})
    command = [sys.executable, str(Path(__file__)), request]
    try:
        child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"reason": f"took more than {limit:g} s for a forward and backward pass in a fresh process"}
    if child.returncode:
        last_line = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        return {"reason": last_line[:200]}
    return json.loads(child.stdout.splitlines()[-1])


def main() -> None:
    """The child: run the request, print the peak."""
    asked = json.loads(sys.argv[1])
    case, device, contender = Case(**asked["case"]), asked["device"], named(asked["name"])
    loss = contender.make()
    small = Case(64, case.width, 128, case.dtype)  # loads libraries and the matrix product's own scratch
    step(loss, (case if contender.compiles else small).inputs(device))
    inputs = case.inputs(device)
    extra = peak_extra_bytes(partial(step, loss, inputs), device)
    gradients = sum(x.numel() * x.element_size() for x in inputs[:2])
    print(json.dumps({"peak_extra_mib": round(max(0, extra - gradients) / MIB, 1)}))


if __name__ == "__main__":
    main()
