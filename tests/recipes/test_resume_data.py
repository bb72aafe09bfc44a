"""A run that is killed and resumed sees the batches that an uninterrupted one sees."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("resume_runs.py")
KILLED = -9


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    words = random.Random(0)
    for number in range(12):
        content = " ".join(str(words.randrange(1000)) for _ in range(40))
        (folder / f"{number}.txt").write_text(content)
    return str(folder)


def run(folder, runs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), str(folder), json.dumps(runs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def batches(folder, record, rank=0):
    return (folder / f"{record}.{rank}").read_text().splitlines()


CASES = {
    "plain": {"max_epochs": 3},
    "workers and accumulation": {"max_epochs": 3, "accumulate_grad_batches": 2, "num_workers": 2},
    "workers, by steps": {"max_epochs": -1, "max_steps": 70, "num_workers": 2},
    "accumulation, by steps, with validation": {
        "max_epochs": -1,
        "max_steps": 36,
        "accumulate_grad_batches": 2,
        "val_check_interval": 0.5,
    },
    "two ranks": {"max_epochs": 3, "strategy": "ddp_fork", "devices": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_run_sees_the_same_batches(tmp_path, text, case):
    options = dict(CASES[case])
    data = {"source": text, "sequence_length": 16, "batch_size": 4, "num_workers": options.pop("num_workers", 0)}
    ranks = options.get("devices", 1)
    runs = [{"record": "whole", "data": data, **options}]
    steps_per_epoch = 16 // (ranks * options.get("accumulate_grad_batches", 1))
    steps = (4, steps_per_epoch, steps_per_epoch + 4)  # inside the first epoch, at its end, inside the second
    for step in steps:
        runs.append({**runs[0], "record": f"killed-{step}", "die_after": step})
        resume = str(tmp_path / f"checkpoints-killed-{step}" / f"step={step}.ckpt")
        runs.append({**runs[0], "record": f"resumed-{step}", "resume": resume})
    codes, errors = run(tmp_path, runs)
    assert codes[0] == 0, errors
    assert codes[1:] == [KILLED if ranks == 1 else 1, 0] * len(steps), errors
    assert "not resumable" not in errors
    assert "other data settings" not in errors

    everything = []
    for rank in range(ranks):
        expected = batches(tmp_path, "whole", rank)
        everything += [line.split(" ", 2)[2] + line.split(" ", 1)[0] for line in expected]
        per_epoch = sum(line.startswith("0 ") for line in expected)
        assert len(expected) > 2 * per_epoch
        accumulate = options.get("accumulate_grad_batches", 1)
        assert per_epoch == steps_per_epoch * accumulate
        for step in steps:
            epoch, in_epoch = divmod(step, steps_per_epoch)
            seen = epoch * per_epoch + in_epoch * accumulate
            killed = batches(tmp_path, f"killed-{step}", rank)
            assert len(killed) > seen
            assert killed == expected[: len(killed)]
            assert batches(tmp_path, f"resumed-{step}", rank) == expected[seen:], f"resumed after step {step}"
    assert len(set(everything)) == len(everything)  # ranks and positions of an epoch are disjoint
