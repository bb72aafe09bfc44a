"""Workers outlive what would hang or kill a process, and end with the one that started them."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import task_worker_jobs

from litropy.recipes.tasks import Failure, WorkerPool
from litropy.recipes.tasks import worker_pool as module

SECONDS = 0.8


@pytest.fixture(scope="module")
def pool():
    pool = WorkerPool(task_worker_jobs.job, processes=2, seconds=SECONDS, memory_mib=128)
    yield pool
    pool.close()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def gone(pids, seconds=10):
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids))


def test_results_come_in_order_from_the_same_processes(pool):
    assert pool.map([("double", number) for number in range(50)]) == [2 * number for number in range(50)]
    assert pool.map([("prepared",)]) == [True]
    assert pool.map([]) == []
    pids = {pid for _ in range(3) for pid in pool.map([("pid",)] * 8)}
    assert len(pids) <= 2
    assert os.getpid() not in pids


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (("sleep", 60), "time limit"),
        (("power", 0), "time limit"),
        (("memory", 1000), "out of memory"),
        (("lists",), "out of memory"),
        (("exit",), "process died"),
        (("crash",), "process died"),
        (("quit",), "process died"),
        (("recursion",), "RecursionError"),
        (("nothing",), "LookupError"),
        (("long", 2**21), "process died"),
    ],
)
def test_a_bad_job_fails_alone(pool, job, reason):
    begun = time.monotonic()
    assert pool.map([("double", 1), job, ("double", "\0\ud800 é"), ("double", 3)]) == [
        2,
        Failure(reason),
        "\0\ud800 é" * 2,
        6,
    ]
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("kind", ["stop", "ignore"])
def test_a_process_that_does_not_end_itself_is_ended(pool, kind):
    assert pool.map([(kind,), ("double", 1)]) == [Failure("time limit"), 2]


def test_what_a_job_prints_is_not_taken_for_a_result(pool):
    assert pool.map([("print", "5"), ("double", 2)]) == ["5", 4]


def test_memory_below_the_limit_is_there(pool):
    assert pool.map([("memory", 100)]) == [100 * 2**20]


def test_a_worker_that_died_idle_is_replaced(pool):
    (pid,) = pool.map([("pid",)])
    for worker in pool._workers:
        os.kill(worker._process.pid, signal.SIGKILL)
    assert gone([pid])
    results = pool.map([("double", 1)] * 4)
    assert results.count(2) >= 2
    assert pool.map([("double", 1)] * 4) == [2] * 4


def test_copies_and_forks_have_their_own_processes(pool):
    (mine,) = pool.map([("pid",)])
    copy = pickle.loads(pickle.dumps(pool))
    assert copy.map([("pid",)]) != [mine]
    copy.close()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, str(pool.map([("pid",)])[0]).encode())
            pool.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(reader, 100)) != mine
    os.close(reader)
    os.close(writer)
    assert alive(mine)
    assert pool.map([("double", 4)]) == [8]


def test_ctrl_c_ends_the_processes_and_the_next_jobs_get_new_ones(pool, monkeypatch):
    pids = [worker._process.pid for worker in pool._workers]

    def interrupted(workers):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_first_to_answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.map([("sleep", 30)])
    assert gone(pids)
    assert pool.map([("double", 2)]) == [4]


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import task_worker_jobs
sys.path.insert(0, {tasks!r})
from worker_pool import WorkerPool
pool = WorkerPool(task_worker_jobs.job, processes=2, seconds=2)
print(pool.map([("pid",), ("pid",), ("pid",)]), [w._process.pid for w in pool._workers], flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), signal.SIGKILL)", "os._exit(0)"])
def test_processes_end_with_the_main_program(end):
    """A script without ``if __name__ == '__main__'``, which workers must not run again."""
    here = Path(__file__).parent
    code = SCRIPT.format(folder=str(here), tasks=str(Path(module.__file__).parent), end=end)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    pids = eval(run.stdout.partition("] ")[2])
    assert pids, run.stderr
    assert gone(pids)


def test_a_file_that_cannot_be_imported_says_how_to_see_why(tmp_path, monkeypatch):
    pool = WorkerPool(task_worker_jobs.broken)
    pool._command[2] = str(tmp_path / "missing.py")
    with pytest.raises(RuntimeError, match=r"did not start; run this to see why: .*missing\.py broken"):
        pool.map([()])


@pytest.mark.parametrize("options", [{"processes": 0}, {"seconds": 0}, {"memory_mib": 0}])
def test_limits_have_to_be_above_zero(options):
    with pytest.raises(ValueError, match="must be"):
        WorkerPool(task_worker_jobs.job, **options)
