"""How much of a softmax a backward pass may leave out: the share of tiles that survive ``skip_tol``.

    python benchmarks/survival.py                     # trains the CPU quickstart first, 8 minutes on two cores
    python benchmarks/survival.py --steps 180 5000    # models that are trained for longer

Which tiles survive is what ``select_tiles`` says, the rule of the implementation. Tiles of one row always keep the tile
of the target; for larger tiles the backward pass adds targets by themselves. The vocabulary stands in its own order, at
random, by how often the training text has each token, or by mean probability over the batch.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from machine import describe, slug
from torch import Tensor
from trained_head import CACHE, CONFIG, TrainedHead, config_steps, trained_file

from litropy.kernels.linear_head_skipping import select_tiles
from litropy.kernels.linear_head_types import RowStats, Want

RESULTS = Path(__file__).parent / "results"
TOLERANCES = (1e-4, 1e-3, 1e-2)
TILES = ((1, 128), (1, 256), (1, 512), (1, 1024), (128, 128))
BUDGET = 64 << 20
# rows are also sorted by how sure the model is of them [nats]
ENTROPIES = (0.0, 0.5, 1.0, 2.0, 4.0)


def random_head(like: TrainedHead, tokens: int) -> TrainedHead:
    """Random hidden states, weights (logits of standard deviation 2) and targets, in the shape of a trained head."""
    generator = torch.Generator().manual_seed(0)
    V, D = like.weight.shape
    hidden = torch.randn(tokens, D, generator=generator)
    weight = torch.randn(V, D, generator=generator).mul_(2 / D**0.5)
    target = torch.randint(V, (tokens,), generator=generator)
    return TrainedHead(hidden, weight, target, torch.bincount(target, minlength=V))


def log_probabilities(head: TrainedHead) -> tuple[Tensor, Tensor]:
    """``log p`` [N, V] and the log-sum-exp [N] of the logits."""
    logits = head.hidden @ head.weight.T
    lse = logits.logsumexp(1)
    return logits.sub_(lse[:, None]), lse


def orders(log_p: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Permutations of the vocabulary, likeliest tokens first where there is a likeliest."""
    generator = torch.Generator().manual_seed(1)
    return {
        "own": torch.arange(len(counts)),
        "random": torch.randperm(len(counts), generator=generator),
        "frequency": counts.argsort(descending=True, stable=True),
        "mean probability": log_p.exp().mean(0).argsort(descending=True),
    }


def surviving(log_p: Tensor, lse: Tensor, target: Tensor, tile: tuple[int, int], skip_tol: float) -> RowStats:
    """Which share of its tiles survives in each row, and the mass of the others, for columns in the order given.

    Args:
        log_p: log-probabilities, [N, V].
        lse: log-sum-exp of the logits, [N].
        target: where the target's column is, [N].
        tile: rows and columns.
        skip_tol: the largest share of a row's mass that may be left out.
    """
    N, V = log_p.shape
    padded = torch.nn.functional.pad(log_p, (0, -V % tile[1]), value=-torch.inf)
    log_mass = padded.unflatten(1, (-1, tile[1])).logsumexp(2) + lse[:, None]
    stats = RowStats(lse=lse, skipped_mass=torch.zeros(N), surviving_share=torch.zeros(N))
    select_tiles(log_mass, tile, V, stats, target, Want(), skip_tol, BUDGET, None)
    return stats


def by_entropy(stats: RowStats, entropy: Tensor) -> list[dict[str, float]]:
    """The surviving share of the rows from each entropy to the next, and how many rows these are."""
    bins = []
    for low, high in zip(ENTROPIES, (*ENTROPIES[1:], torch.inf), strict=True):
        rows = (entropy >= low) & (entropy < high)
        share = stats.surviving_share[rows].mean().item() if rows.any() else 0.0
        bins.append({"from": low, "rows": int(rows.sum()), "surviving_share": share})
    return bins


def measure(name: str, head: TrainedHead) -> dict[str, Any]:
    """Everything about one head."""
    log_p, lse = log_probabilities(head)
    entropy = -(log_p.exp() * log_p).sum(1)
    loss = -log_p.gather(1, head.target[:, None]).mean()
    record: dict[str, Any] = {
        "data": name,
        "tokens": len(head.hidden),
        "width": head.hidden.shape[1],
        "vocabulary": len(head.weight),
        "loss": round(loss.item(), 3),
        "mean_entropy": round(entropy.mean().item(), 3),
        "rows": [],
    }
    for order, permutation in orders(log_p, head.counts).items():
        ordered, place = log_p[:, permutation], permutation.argsort()[head.target]
        for tile, skip_tol in itertools.product(TILES, TOLERANCES):
            stats = surviving(ordered, lse, place, tile, skip_tol)
            row = {"order": order, "tile": tile, "skip_tol": skip_tol}
            row["surviving_share"] = stats.surviving_share.mean().item()
            row["mean_skipped_mass"] = stats.skipped_mass.mean().item()
            row["largest_skipped_mass"] = stats.skipped_mass.max().item()
            if tile[0] == 1:
                row["by_entropy"] = by_entropy(stats, entropy)
            record["rows"].append(row)
    return record


def show(record: dict[str, Any]) -> None:
    """Print the surviving shares."""
    print(f"{record['data']}: loss {record['loss']}, entropy {record['mean_entropy']} nats")
    for start in range(0, len(record["rows"]), len(TOLERANCES)):
        rows = record["rows"][start : start + len(TOLERANCES)]
        order, (height, width) = rows[0]["order"], rows[0]["tile"]
        print(f"  {order:>16}  {height:>3} x {width:<4}  {_shares(rows)}", flush=True)
        for bins in zip(*(row.get("by_entropy", []) for row in rows), strict=True):
            if bins[0]["rows"]:
                print(f"  {'entropy from':>20} {bins[0]['from']:3}  {_shares(bins)}")


def _shares(rows: Sequence[dict[str, Any]]) -> str:
    return "  ".join(f"{row['surviving_share']:6.3f}" for row in rows)


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder where models are trained and kept")
    parser.add_argument("--steps", type=int, nargs="+", default=[config_steps(), 1000], help="training of each model")
    parser.add_argument("--tokens", type=int, default=4096, help="rows of hidden states")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: results/survival_<machine>.json)")
    options = parser.parse_args()
    machine = describe("cpu")
    heads = {}
    for steps in options.steps:
        head = TrainedHead.load(trained_file(options.cache, steps)).sample(options.tokens)
        heads[f"{steps} steps"] = head
    heads["random"] = random_head(head, options.tokens)
    record: dict[str, Any] = {
        "benchmark": "survival",
        "machine": machine,
        "config": CONFIG,
        "tolerances": TOLERANCES,
        "cases": [],
    }
    for name, head in heads.items():
        record["cases"].append(measure(name, head))
        show(record["cases"][-1])
    output = options.output or RESULTS / f"survival_{slug(machine['hardware'])}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"Wrote {output}")


if __name__ == "__main__":
    main()
