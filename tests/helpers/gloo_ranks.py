"""Run a script on several gloo ranks of this machine, as ``torchrun`` would, without importing torch for each."""

import os
import runpy
import sys

import torch
from torch.distributed import TCPStore

# imported once, in the process that all ranks of a session's launches are forked from
PRELOADED = ["torch", "lightning.pytorch", "transformers", "litropy.callbacks", "litropy.recipes", "litropy.testing"]


def launch(script, *arguments, ranks=2):
    """Run ``python SCRIPT ARGUMENTS`` on every rank of a new world; raises what the first rank that fails has raised.

    Ranks are forked from a clean process, which has no threads and nothing of the tests that ran before.
    """
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # the system chooses a free port
    command = [str(script), *map(str, arguments)]
    processes = torch.multiprocessing.start_processes(
        run, (ranks, store.port, command), ranks, join=False, start_method="forkserver"
    )
    try:
        while not processes.join():  # until all have ended; pytest's time limit interrupts it
            pass
    finally:
        for process in processes.processes:
            if process.is_alive():
                process.kill()


def run(rank, ranks, port, command):
    """One rank: what torchrun sets, and the script as if it were started alone."""
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    world |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    world |= {"TORCHELASTIC_RUN_ID": "tests", "TORCHELASTIC_RESTART_COUNT": 0, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in world.items()})
    os.environ.pop("PL_GLOBAL_SEED", None)  # of a test that came before the process that this is forked from
    torch.set_num_threads(1)
    sys.argv, sys.path[:0] = command, [os.path.dirname(command[0])]
    runpy.run_path(command[0], run_name="__main__")
