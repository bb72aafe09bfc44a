"""Check what a quickstart run left behind: metrics that show learning, checkpoint, curves and a Hugging Face folder."""

import csv
import sys
from pathlib import Path

REQUIRED_GAIN = 0.4  # nats below the unigram entropy of the data


def last(rows: list[dict[str, str]], name: str) -> float:
    """Last logged value of a metric."""
    values = [float(row[name]) for row in rows if row.get(name)]
    assert values, f"{name} was never logged"
    return values[-1]


def main(config_runs: str) -> None:
    """Check the newest run.

    Args:
        config_runs: ``runs/<config name>``.
    """
    run = max(Path(config_runs).glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
    missing = [
        name
        for name in ("config.yaml", "metrics.csv", "curves.png", "checkpoints/last.ckpt", "hugging_face/config.json")
        if not (run / name).is_file()
    ]
    assert not missing, f"{run} lacks {missing}"
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    loss, unigram = last(rows, "val/loss"), last(rows, "data/unigram_entropy")
    print(f"{run}: val/loss {loss:.3f}, data/unigram_entropy {unigram:.3f} nats")
    assert loss <= unigram - REQUIRED_GAIN, f"val/loss {loss:.3f} is not {REQUIRED_GAIN} below {unigram:.3f}"


if __name__ == "__main__":
    main(sys.argv[1])
