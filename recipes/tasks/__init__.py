"""Verifiable tasks: problems from a seed or a file, their checks, and rewards made of these."""

from litropy.recipes.tasks.arithmetic import Arithmetic, SumToTarget
from litropy.recipes.tasks.checkers import CheckerJumping
from litropy.recipes.tasks.countdown import Countdown
from litropy.recipes.tasks.kolmogorov import KolmogorovTest
from litropy.recipes.tasks.rewards import Correctness, Format, RewardSum, SoftOverlong
from litropy.recipes.tasks.river import RiverCrossing
from litropy.recipes.tasks.stacks import BlocksWorld, TowerOfHanoi
from litropy.recipes.tasks.task import GeneratedTask, Spec, Task, Verdict, task_key
from litropy.recipes.tasks.worker_pool import Failure, WorkerPool

__all__ = [
    "Arithmetic",
    "BlocksWorld",
    "CheckerJumping",
    "Correctness",
    "Countdown",
    "Failure",
    "Format",
    "GeneratedTask",
    "KolmogorovTest",
    "RewardSum",
    "RiverCrossing",
    "SoftOverlong",
    "Spec",
    "SumToTarget",
    "Task",
    "TowerOfHanoi",
    "Verdict",
    "WorkerPool",
    "task_key",
]
