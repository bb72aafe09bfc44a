"""Runs on every rank of test_steering_contract.py: each method's update, one after the other. Argument: a folder."""

import sys
from pathlib import Path

import rlvr_problems as problems
import steering_cases as cases
import torch
import torch.distributed as dist

from litropy.recipes.rlvr_ranks import gather_batch, rank_and_ranks, sum_gradients

if __name__ == "__main__":
    dist.init_process_group("gloo")
    policy, rollouts, found = problems.policy(), problems.rollouts(3, 3), {}
    for name in cases.CASES:
        made = cases.methods(name)
        near = cases.near_policy(policy, rollouts, made)
        rank, ranks = rank_and_ranks()
        # each rank has sampled whole groups, one of them more than the other
        mine = near[(near.group % ranks == rank).nonzero()[:, 0]]
        gathered = gather_batch(mine)
        _, objective, _ = cases.gradients(policy, made, gathered, 2)
        sum_gradients(policy.parameters())
        total = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
        found[name] = {"gradient": total, "kept": objective.kept, "weight": objective.weight, "loss": objective.loss}
    torch.save(found, Path(sys.argv[1]) / f"rank_{rank}.pt")
    dist.destroy_process_group()
