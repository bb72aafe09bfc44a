"""Heads whose vocabulary is cut over two or four CPU processes, against one process."""

import json
import sys
from pathlib import Path

import gloo_ranks
import pytest

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))

from vocab_parallel_worker import CHECKS  # noqa: E402 it lies beside this file


def launch(folder, ranks):
    """What went wrong in each check on each rank."""
    gloo_ranks.launch(FOLDER / "vocab_parallel_worker.py", folder, ranks=ranks)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("four"), 4)


def report(failures, name):
    texts = [f"rank {rank}: {found[name]}" for rank, found in enumerate(failures) if found[name] is not None]
    assert not texts, "\n".join(texts)


@pytest.mark.parametrize("name", CHECKS[2])
def test_on_two_ranks(two, name):
    report(two, name)


@pytest.mark.parametrize("name", CHECKS[4])
def test_on_four_ranks(four, name):
    report(four, name)
