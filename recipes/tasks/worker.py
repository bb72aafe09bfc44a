"""Program of a worker process: runs one function on one job after the other, under limits.

It is started by its path, and imports nothing of this package, so that a worker has begun in a fraction of a second and
takes little memory. Jobs and results are lines of JSON on standard input and output.
"""

import importlib.util
import json
import os
import signal
import sys
from typing import Any

__all__ = ["main"]


def main() -> None:
    """Take jobs until standard input ends: ``worker.py FILE FUNCTION CPU_SECONDS SECONDS MEMORY_MIB``."""
    file, function, cpu_seconds, seconds, memory_mib = sys.argv[1:]
    # what a library prints must not get among the results
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    source = importlib.util.spec_from_file_location("checker", file)
    assert source is not None
    assert source.loader is not None
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    call = getattr(module, function)
    getattr(module, "prepare", lambda: None)()
    _limit_memory(int(memory_mib))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this process
    _answer(results, {"ready": True})
    for line in sys.stdin:
        # the default action of these alarms ends the process even inside of C code, and when the parent is gone
        signal.setitimer(signal.ITIMER_PROF, float(cpu_seconds))
        signal.setitimer(signal.ITIMER_REAL, float(seconds))
        result = _run(call, json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _answer(results, result)
        if "memory" in result:
            return  # what is left of the heap is not to be trusted


def _run(call: Any, arguments: list[Any]) -> dict[str, Any]:
    try:
        return {"value": call(*arguments)}
    except MemoryError:
        return {"failure": "out of memory", "memory": True}
    except Exception as error:
        return {"failure": type(error).__name__}


def _answer(results: Any, result: dict[str, Any]) -> None:
    results.write(json.dumps(result) + "\n")
    results.flush()


def _limit_memory(mebibytes: int) -> None:
    import resource

    pages = int(open("/proc/self/statm").read().split()[0]) if os.path.exists("/proc/self/statm") else 0  # noqa: SIM115
    limit = pages * resource.getpagesize() + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
