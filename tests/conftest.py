"""Shared by all tests: kernels run in Triton's interpreter where there is no GPU, and the same files run on one."""

import os
import sys
from pathlib import Path

# before torch is imported: one thread a process, as there is a worker for each core; those who wait leave the core
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import pytest
import torch

torch.set_num_threads(1)

if not torch.cuda.is_available():
    # before anything imports triton, which reads it once
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# what test files share; no package, so that no folder of tests hides one of ours
sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("helpers", "kernels")]
pytest.register_assert_rewrite("linear_head_problems")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MOST_WORKERS = 4  # each takes 1.5 GB


def pytest_xdist_auto_num_workers(config):
    """A worker a core, none for one file, which is done before they have started, and none where they share a GPU."""
    if torch.cuda.is_available():
        return 0
    paths = [Path(argument.split("::")[0]) for argument in config.args]
    files = len(set(paths)) if all(path.is_file() for path in paths) else MOST_WORKERS
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(files, cores, MOST_WORKERS)
    return workers if workers > 1 else 0


@pytest.fixture(autouse=True)
def _seed():
    os.environ.pop("PL_GLOBAL_SEED", None)  # what seed_everything leaves to later tests
    torch.manual_seed(0)


@pytest.fixture
def device():
    """Where kernels run: a GPU if there is one."""
    return torch.device(DEVICE)


@pytest.fixture
def poisoned_empty():
    """Fill uninitialised memory with NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    # files with slow tests first, so that no worker is left alone with one; files stay whole, as do their fixtures
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
