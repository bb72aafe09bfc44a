"""Runs on every rank of test_rlvr.py: two ranks with half of each batch. Argument: a folder."""

import os
import sys
from pathlib import Path

import rlvr_problems as problems
import torch
from lightning.pytorch.strategies import DDPStrategy

from litropy.recipes import RLVR

if __name__ == "__main__":
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    data = problems.Sums(batches=3, size=4 // ranks, rank=rank, ranks=ranks)
    found = problems.scripted_run(RLVR, data, DDPStrategy(process_group_backend="gloo"), ranks)
    torch.save(found, Path(sys.argv[1]) / f"rank_{rank}.pt")
