"""Shared by all tests: kernels run in Triton's interpreter where there is no GPU, and the same files run on one."""

import os
import sys
from pathlib import Path

# before torch is imported: one thread a process, as there is a worker for each core; those who wait leave the core
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import pytest  # noqa: E402
import torch  # noqa: E402

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


@pytest.fixture(autouse=True)
def _seed():
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
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
