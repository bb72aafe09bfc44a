"""Check what the collapsing quickstart left behind: a collapse, a critical alarm, a recovery, and a picture of them."""

import csv
import math
import statistics
import sys
from pathlib import Path

Row = dict[str, float]


def read(run: Path) -> list[Row]:
    """Rows of metrics.csv in which attention was probed."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in rows if "entropy/attention/mean" in row]


def lowest(row: Row) -> float:
    """Entropy of the layer that has the least."""
    return min(value for name, value in row.items() if name.startswith("entropy/attention/layer_"))


def main(config_runs: str) -> None:
    """Check the newest run.

    Args:
        config_runs: ``runs/<config name>``.
    """
    run = max(Path(config_runs).glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
    assert (run / "curves.png").is_file(), f"{run} lacks curves.png"
    rows = read(run)
    assert all(math.isfinite(row["train/loss"]) for row in rows), "a loss is not finite"
    alarmed = [row["collapse/alarm"] == 2 for row in rows]
    assert any(alarmed), f"no critical alarm in {len(rows)} rows"
    index = alarmed.index(True)
    # the remedies act between the steps, so the first row with the alarm may show their work already
    before, after = rows[max(0, index - 10) : index], rows[index:]
    fallen = lowest(before[-1])
    risen = max(row["entropy/attention/mean"] for row in after[:20])
    losses = [statistics.fmean(row["train/loss"] for row in part) for part in (before, after[-10:])]
    print(
        f"{run}: lowest entropy {lowest(rows[0]):.2f} at first, {fallen:.2f} at the alarm of step"
        f" {after[0]['step']:.0f}, {lowest(after[-1]):.2f} at the end; mean entropy up to {risen:.2f} again;"
        f" loss {losses[0]:.2f}, then {losses[1]:.2f} nats"
    )
    assert lowest(rows[0]) > 0.5, "attention starts collapsed"
    assert fallen < 0.25, "no layer's attention had collapsed before the alarm"
    assert after[0]["train/learning_rate_factor"] < 1, "the alarm did not lower the learning rate"
    assert risen > 0.5, "attention did not recover"
    assert lowest(after[-1]) > 1.5 * fallen, "attention did not stay recovered"
    assert losses[1] < losses[0] - 0.1, "the loss did not fall after the recovery"


if __name__ == "__main__":
    main(sys.argv[1])
