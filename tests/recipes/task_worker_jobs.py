"""What test_task_workers.py runs in worker processes."""

import os
import signal
import sys
import time

PREPARED = []


def prepare():
    PREPARED.append(os.getpid())


def job(kind, value=None):
    """Do something good or bad."""
    if kind == "double":
        return 2 * value
    if kind == "prepared":
        return [os.getpid()] == PREPARED
    if kind == "pid":
        return os.getpid()
    if kind == "print":
        print("noise")
        os.write(1, b"more noise\n")
        return value
    if kind == "sleep":
        time.sleep(value)
        return value
    if kind == "power":  # one C call, which no Python signal handler interrupts
        return len(str(9**9**8)) + value
    if kind == "memory":
        return len(bytearray(value * 2**20))
    if kind == "lists":
        held = []
        while True:
            held.append([0] * 10**6)
    if kind == "exit":
        os._exit(3)
    if kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "recursion":
        return job(kind, value)
    if kind == "ignore":
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        time.sleep(60)
    if kind == "quit":
        sys.exit(1)
    if kind == "long":
        return "x" * value
    raise LookupError(kind)


def broken():
    """Never called."""
