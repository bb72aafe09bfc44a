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


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("limit", ["epochs", "steps"])
def test_killed_and_resumed_run_sees_the_same_batches(tmp_path, text, num_workers, accumulate, limit):
    steps = {"max_epochs": 3} if limit == "epochs" else {"max_epochs": -1, "max_steps": 40}
    data = {"source": text, "sequence_length": 16, "batch_size": 4, "num_workers": num_workers}
    options = {"data": data, "accumulate_grad_batches": accumulate, **steps}
    whole = {"record": "whole", **options}
    (code,), errors = run(tmp_path, [whole])
    assert code == 0, errors
    expected = batches(tmp_path, "whole")
    per_epoch = sum(line.startswith("0 ") for line in expected)
    assert len(expected) > 2 * per_epoch > 20
    assert len(set(expected)) == len(expected)

    saved = sorted((tmp_path / "checkpoints-whole").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    steps_per_epoch = -(-per_epoch // accumulate)
    runs, cases = [], []
    for checkpoint in (saved[0], saved[len(saved) // 2], saved[-2]):
        step = int(checkpoint.stem.split("=")[1])
        epoch, in_epoch = divmod(step, steps_per_epoch)
        seen = epoch * per_epoch + min(in_epoch * accumulate, per_epoch)
        record = f"resumed-{step}"
        runs.append({**options, "record": f"killed-{step}", "die_at": seen + 2})
        runs.append(
            {**options, "record": record, "resume": str(tmp_path / f"checkpoints-killed-{step}" / checkpoint.name)}
        )
        cases.append((step, seen))
    codes, errors = run(tmp_path, runs)
    assert codes == [KILLED, 0] * len(cases), errors
    for step, seen in cases:
        assert batches(tmp_path, f"killed-{step}")[:seen] == expected[:seen]
        assert batches(tmp_path, f"resumed-{step}") == expected[seen:], f"resumed after step {step}"
    assert "not resumable" not in errors
    assert "other data settings" not in errors
