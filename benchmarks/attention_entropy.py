"""Time, peak memory and error of reading the entropy of attention, against attention that is stored.

    python benchmarks/attention_entropy.py            # a minute on two CPU cores
    python benchmarks/attention_entropy.py --quick    # a small shape, for a smoke test

Causal attention of random queries and keys, without gradients: 64 query rows of each head, as the monitor takes them by
default, or all rows. "stored" forms the logits of those rows, [B, H, rows, T], and their softmax. On a GPU there is
also what FlexAttention returns beside its output, log-sum-exp and greatest score, which is less than an entropy.
Times come from interleaved rounds in one process. ``report.py`` turns the JSON into tables.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import describe, slug
from measuring import MIB, interleaved_times, peak_extra_bytes, summary_ms
from torch import Tensor

from litropy.kernels.attention_entropy import attention_entropy

RESULTS = Path(__file__).parent / "results"
SAMPLED = 64


class Case(NamedTuple):
    """Queries [B, H, T, D] and as many keys in ``kv_heads`` heads."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    width: int
    dtype: str


CASES = {
    "cpu": [Case(1, 12, 12, 2048, 64, "float32"), Case(1, 12, 12, 2048, 64, "bfloat16")],
    "cuda": [Case(1, 32, 8, 8192, 128, "bfloat16"), Case(8, 12, 12, 2048, 64, "bfloat16")],
}
QUICK = [Case(1, 2, 1, 256, 32, "float32")]
# rows (None for all), and the entropy of queries, keys and rows
Contender = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def ours(q: Tensor, k: Tensor, rows: Tensor | None) -> Tensor:
    """Entropies [B, H, R] without the matrix."""
    return attention_entropy(q, k, causal=True, rows=rows).entropy


def stored(q: Tensor, k: Tensor, rows: Tensor | None) -> Tensor:
    """Entropies [B, H, R] from probabilities that are kept, in float32 (float64 for float64 inputs)."""
    rows = torch.arange(q.shape[2], device=q.device) if rows is None else rows
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    z = (q[:, :, rows] @ keys.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    hidden = torch.arange(k.shape[2], device=q.device) > rows[:, None]
    logp = z.masked_fill_(hidden, -torch.inf).log_softmax(-1)
    return -(logp.exp() * logp.masked_fill(hidden, 0)).sum(-1)


def flex_probe() -> Contender:
    """FlexAttention's statistics of all rows; they come with the whole of attention."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    attend = torch.compile(flex_attention, dynamic=False)

    def probe(q: Tensor, k: Tensor, rows: Tensor | None) -> Tensor:
        T = q.shape[2]
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=str(q.device))
        _, found = attend(q, k, k, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True, max_scores=True))
        return found.max_scores

    return probe


def contenders(device: str) -> dict[str, tuple[Contender, int | None]]:
    """What is compared, each with the number of its rows, None for all."""
    found: dict[str, tuple[Contender, int | None]] = {
        f"litropy, {SAMPLED} rows": (ours, SAMPLED),
        f"stored, {SAMPLED} rows": (stored, SAMPLED),
        "litropy, all rows": (ours, None),
        "stored, all rows": (stored, None),
    }
    if device == "cuda":
        found["FlexAttention with log-sum-exp and greatest score, all rows"] = (flex_probe(), None)
    return found


@torch.no_grad()
def run_case(case: Case, device: str, rounds: int) -> dict[str, Any]:
    """Everything about one shape."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    q, k = (
        torch.randn(case.batch, heads, case.length, case.width, generator=generator, device=device).to(dtype) * 1.5
        for heads in (case.heads, case.kv_heads)
    )
    sample = torch.linspace(0, case.length - 1, SAMPLED, device=device).long()
    truth = stored(q.double(), k.double(), sample)
    steps, errors = {}, {}
    for name, (contender, count) in contenders(device).items():
        steps[name] = partial(contender, q, k, None if count is None else sample)
        found = steps[name]()  # also warms up
        if contender in (ours, stored):
            errors[name] = ((found if count else found[:, :, sample]) - truth).abs().max().item()
    seconds = interleaved_times(steps, rounds, device, patience=60.0)
    results = [
        {
            "name": name,
            **summary_ms(seconds[name]),
            "peak_extra_mib": round(max(0, peak_extra_bytes(step, device)) / MIB, 1),
            "largest_error": errors.get(name),
        }
        for name, step in steps.items()
    ]
    return {**case._asdict(), "results": results}


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small shape")
    parser.add_argument("--rounds", type=int, default=9, help="how often each contender is timed")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/attention_entropy_<machine>.json)")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = describe(device)
    record: dict[str, Any] = {"benchmark": "attention_entropy", "machine": machine, "cases": []}
    name = f"attention_entropy_{slug(machine['hardware'])}{'_quick' if options.quick else ''}.json"
    output = options.output or RESULTS / name
    output.parent.mkdir(parents=True, exist_ok=True)
    for case in QUICK if options.quick else CASES[device]:
        record["cases"].append(run_case(case, device, options.rounds))
        output.write_text(json.dumps(record, indent=1) + "\n")
        for result in record["cases"][-1]["results"]:
            print(f"  {result['name']}: {result['median_ms']:.1f} ms, {result['peak_extra_mib']} MiB", flush=True)
    print(f"Wrote {output}")


if __name__ == "__main__":
    main()
