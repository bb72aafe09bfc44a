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


def places(case):
    """Steps in an epoch, and where a case is killed: inside the first epoch, at its end, inside the second."""
    steps = 16 // (CASES[case].get("devices", 1) * CASES[case].get("accumulate_grad_batches", 1))
    return steps, (4, steps, steps + 4)


def runs_of(case, folder, text):
    """One run that is left alone, and for each place one that is killed and one that goes on."""
    options = dict(CASES[case])
    data = {"source": text, "sequence_length": 16, "batch_size": 4, "num_workers": options.pop("num_workers", 0)}
    runs = [{"record": "whole", "data": data, **options}]
    for step in places(case)[1]:
        runs.append({**runs[0], "record": f"killed-{step}", "die_after": step})
        resume = str(folder / f"checkpoints-killed-{step}" / f"step={step}.ckpt")
        runs.append({**runs[0], "record": f"resumed-{step}", "resume": resume})
    return runs


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Folder and exit codes of each case, and what all wrote to stderr; one process imports torch for all."""
    text = tmp_path_factory.mktemp("text")
    words = random.Random(0)
    for number in range(12):
        content = " ".join(str(words.randrange(1000)) for _ in range(40))
        (text / f"{number}.txt").write_text(content)
    folders = {case: tmp_path_factory.mktemp("case") for case in CASES}
    jobs = {str(folder): runs_of(case, folder, str(text)) for case, folder in folders.items()}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), json.dumps(jobs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    return {case: (folder, codes[str(folder)]) for case, folder in folders.items()}, done.stderr


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_run_sees_the_same_batches(outcome, case):
    (folder, codes), errors = outcome[0][case], outcome[1]
    ranks, accumulate = (CASES[case].get(name, 1) for name in ("devices", "accumulate_grad_batches"))
    steps_per_epoch, steps = places(case)
    assert codes[0] == 0, errors
    assert codes[1:] == [KILLED if ranks == 1 else 1, 0] * len(steps), errors
    assert "not resumable" not in errors
    assert "other data settings" not in errors

    everything = []
    for rank in range(ranks):
        expected = batches(folder, "whole", rank)
        everything += [line.split(" ", 2)[2] + line.split(" ", 1)[0] for line in expected]
        per_epoch = sum(line.startswith("0 ") for line in expected)
        assert len(expected) > 2 * per_epoch
        assert per_epoch == steps_per_epoch * accumulate
        for step in steps:
            epoch, in_epoch = divmod(step, steps_per_epoch)
            seen = epoch * per_epoch + in_epoch * accumulate
            killed = batches(folder, f"killed-{step}", rank)
            assert len(killed) > seen
            assert killed == expected[: len(killed)]
            assert batches(folder, f"resumed-{step}", rank) == expected[seen:], f"resumed after step {step}"
    assert len(set(everything)) == len(everything)  # ranks and positions of an epoch are disjoint
