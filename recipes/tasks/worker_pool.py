"""Run a function on hostile input, in worker processes that can be killed."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from inspect import getsourcefile
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Failure", "WorkerPool"]

_STARTUP_SECONDS = 120.0
_GRACE_SECONDS = 2.0
_CLOCK = 4  # how much longer than its processor time a job may take by the clock
_LONGEST_RESULT = 2**20


class Failure(NamedTuple):
    """Why a job has no result.

    Attributes:
        reason: time limit, out of memory, process died, or the name of an exception.
    """

    reason: str


class WorkerPool:
    """A few processes that run one function, each job within limits of time and memory.

    Processes start when they are first needed, are used again, and are replaced after a job that killed them. They are
    new Python processes, neither forks nor copies of the main program, and end with the process that started them.
    Memory is limited where the system has RLIMIT_AS, as Linux has.

    Args:
        function: top-level function of a file that runs by itself; takes and returns what JSON can say. A function
            ``prepare`` in the same file is called before the first job, outside of the limits.
        processes: how many, at least 1.
        seconds: most processor time [s] for a job, which does not depend on what else the machine does; by the clock
            it may take four times as long.
        memory_mib: memory [MiB] that jobs may take beyond what the process has after importing the file.

    Raises:
        ValueError: if an option is out of its range.
    """

    def __init__(
        self, function: Callable[..., Any], processes: int = 2, seconds: float = 5.0, memory_mib: int = 1024
    ) -> None:
        if processes < 1 or seconds <= 0 or memory_mib < 1:
            raise ValueError(
                f"`processes`, `seconds` and `memory_mib` are {processes}, {seconds} and {memory_mib}; they must be"
                " above 0."
            )
        file = getsourcefile(function)
        assert file is not None, "functions in files only"
        self.processes = processes
        self.seconds = _CLOCK * seconds
        worker = Path(__file__).with_name("worker.py")
        self._command = [
            sys.executable,
            *(
                str(worker),
                str(Path(file).resolve()),
                function.__qualname__,
                str(seconds),
                str(self.seconds),
                str(memory_mib),
            ),
        ]
        self._workers: list[_Worker] = []
        self._owner = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_workers": []}

    def map(self, jobs: Sequence[Sequence[Any]]) -> list[Any]:
        """Run the function on the arguments of every job.

        Args:
            jobs: lists of arguments.

        Returns:
            A result or ``Failure`` for each job, in order.

        Raises:
            RuntimeError: if a worker does not even start.
        """
        if self._owner != os.getpid():  # after a fork, the parent's workers are not ours
            self._workers, self._owner = [], os.getpid()
        results: list[Any] = [None] * len(jobs)
        waiting = list(reversed(range(len(jobs))))
        running: dict[_Worker, int] = {}
        try:
            while waiting or running:
                self._hand_out(jobs, waiting, running)
                for worker in _first_to_answer(list(running)):
                    result = worker.result()
                    if worker.dead:
                        self._workers.remove(worker)
                    results[running.pop(worker)] = result
        except BaseException:  # Ctrl-C above all: who is in the middle of a job cannot be used again
            self.close()
            raise
        return results

    def close(self) -> None:
        """End all processes; new ones start when they are needed."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _hand_out(self, jobs: Sequence[Sequence[Any]], waiting: list[int], running: "dict[_Worker, int]") -> None:
        while waiting and len(running) < self.processes:
            idle = [worker for worker in self._workers if worker not in running]
            if not idle:
                idle = [_Worker(self._command, self.seconds)]
                self._workers += idle
            job = waiting.pop()
            idle[0].send(jobs[job])
            running[idle[0]] = job


class _Worker:
    """One process, from its first job on."""

    def __init__(self, command: list[str], seconds: float) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._seconds = seconds
        self._ready = False
        self._deadline = time.monotonic() + _STARTUP_SECONDS
        self._received = b""
        self.dead = False
        os.set_blocking(self.fileno(), False)
        self.kill = weakref.finalize(self, _kill, self._process, os.getpid())  # also when Python ends

    def fileno(self) -> int:
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def send(self, arguments: Sequence[Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # if it has died since its last job, which `result` will find
            self._process.stdin.write(json.dumps(arguments).encode() + b"\n")
            self._process.stdin.flush()
        if self._ready:
            self._deadline = time.monotonic() + self._seconds + _GRACE_SECONDS

    def left(self) -> float:
        """Seconds until its job has to be done."""
        return self._deadline - time.monotonic()

    def has_result(self) -> bool:
        """Read what there is; whether the job is over, in one way or another."""
        while True:
            try:
                chunk = os.read(self.fileno(), 65536)
            except BlockingIOError:
                break
            self._received += chunk
            if not chunk or len(self._received) > _LONGEST_RESULT:
                self.dead = True
                return True
            if not self._ready and b"\n" in self._received:
                self._ready = True
                self._received = self._received.partition(b"\n")[2]
                self._deadline = time.monotonic() + self._seconds + _GRACE_SECONDS
            if self._received.endswith(b"\n"):
                return True
        self.dead = self.left() <= 0
        return self.dead

    def result(self) -> Any:
        received, self._received = self._received, b""
        if self.dead:
            late = self.left() <= 0
            self.kill()
            if not self._ready:
                command = " ".join(map(str, self._process.args))  # type: ignore[arg-type]
                raise RuntimeError(f"A worker process did not start; run this to see why: {command}")
            late = late or self._process.returncode in (-signal.SIGALRM, -signal.SIGPROF)
            return Failure("time limit" if late else "process died")
        answer = json.loads(received)
        if "memory" in answer:
            self.dead = True
            self.kill()
        return answer["value"] if "value" in answer else Failure(answer["failure"])


def _first_to_answer(workers: list[_Worker]) -> list[_Worker]:
    """Wait until jobs are over."""
    while True:
        done = [worker for worker in workers if worker.has_result()]
        if done:
            return done
        wait([worker.fileno() for worker in workers], max(0.0, min(worker.left() for worker in workers)))


def _kill(process: "subprocess.Popen[bytes]", owner: int) -> None:
    if os.getpid() != owner:  # after a fork, the parent's workers live on
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()
