"""Check what the reinforcement learning quickstart left behind: it learned from rewards, and its entropy was held."""

import csv
import math
import statistics
import sys
from pathlib import Path

TARGET, TOLERANCE = 0.08, 0.1  # nats a token: of the controller in the config, and how far off it may be
AT_FIRST, AT_LAST = 0.2, 0.9


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    """Logged values of a metric."""
    values = [float(row[name]) for row in rows if row.get(name)]
    assert values, f"{name} was never logged"
    return values


def main(config_runs: str) -> None:
    """Check the newest run.

    Args:
        config_runs: ``runs/<config name>``.
    """
    run = max(Path(config_runs).glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    first = next(index for index, row in enumerate(rows) if row.get("reward/mean"))  # the warm start is before
    before, after = column(rows[:first], "val/pass_at_1")[-1], column(rows[first:], "val/pass_at_1")[-1]
    entropy = column(rows[first:], "entropy/output")
    held = statistics.fmean(entropy[-5:])
    print(
        f"{run}: val/pass_at_1 {before:.3f} after the warm start, {after:.3f} at the end; entropy/output"
        f" {entropy[0]:.2f} nats at first, {held:.3f} in the last batches"
    )
    assert all(math.isfinite(loss) for loss in column(rows, "train/loss")), "a loss is not finite"
    assert before < AT_FIRST, f"val/pass_at_1 is {before:.3f} before there was any reward"
    assert after > AT_LAST, f"val/pass_at_1 ends at {after:.3f}"
    assert abs(held - TARGET) < TOLERANCE, f"entropy/output is {held:.3f}, its target {TARGET}"


if __name__ == "__main__":
    main(sys.argv[1])
