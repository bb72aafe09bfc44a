"""Puzzles of stacks: the Tower of Hanoi and the blocks world."""

from collections.abc import Iterator
from random import Random

from litropy.recipes.tasks.puzzle import Puzzle, Size, Start
from litropy.recipes.tasks.task import Spec

__all__ = ["BlocksWorld", "TowerOfHanoi"]


def _shifts(stacks: list[str]) -> Iterator[tuple[str, str, str, str]]:
    """Every way to move a top: its name, what is moved, what it comes to lie on, the stacks afterwards."""
    for source, stack in enumerate(stacks):
        for target, other in enumerate(stacks):
            if stack and source != target:
                after = list(stacks)
                after[source], after[target] = stack[:-1], other + stack[-1]
                yield f"{source + 1}{target + 1}", stack[-1], other[-1:], "|".join(after)


class TowerOfHanoi(Puzzle):
    """Move a tower disk by disk, never a larger one onto a smaller: ``321||>||321``, answer ``13 12 32 13 21 23 13``.

    Pegs are separated by bars, disks are listed from the bottom; 13 moves the top of peg 1 to peg 3.

    Args:
        min_disks: fewest disks, at least 1.
        max_disks: most disks, at most 7, whose tower takes 2^7 - 1 moves.
        start: any legal position, or first, the whole tower on peg 1 with its goal on peg 3.

    Raises:
        ValueError: if the number of disks is out of its range.

    Example::

        >>> spec = {"size": [2], "start": "21||", "goal": "||21", "optimum": 3}
        >>> TowerOfHanoi.check(spec, "12 13 23").correct
        True
        >>> TowerOfHanoi.check(spec, "13 13").reason
        'move 2 (13) is illegal'
    """

    spelling = "[1-3]{2}"

    def __init__(self, min_disks: int = 2, max_disks: int = 3, start: Start = "any") -> None:
        if not 1 <= min_disks <= max_disks <= 7:
            raise ValueError(f"`min_disks` and `max_disks` are {min_disks} and {max_disks}; they must be from 1 to 7.")
        self.min_disks = min_disks
        self.max_disks = max_disks
        self.start = start

    def draw_size(self, random: Random) -> Size:
        """Number of disks."""
        return (random.randint(self.min_disks, self.max_disks),)

    def draw_goal(self, random: Random, size: Size) -> str:
        """The whole tower on some peg."""
        peg = 2 if self.start == "first" else random.randrange(3)
        return "|".join(_tower(size) if peg == other else "" for other in range(3))

    @staticmethod
    def origin(size: Size) -> str:
        """The whole tower on peg 1."""
        return f"{_tower(size)}||"

    @staticmethod
    def moves(size: Size, position: str) -> Iterator[tuple[str, str]]:
        """Tops onto larger disks and empty pegs."""
        for name, disk, below, after in _shifts(position.split("|")):
            if not below or disk < below:
                yield name, after

    @staticmethod
    def rules(spec: Spec) -> str:
        """Notation and rules."""
        return (
            "Three pegs, separated by |, hold disks, listed from the bottom; a larger number is a larger disk. Left of"
            " > is the start, right of it the goal. A move takes the top disk of a peg to another peg, never onto a"
            " smaller disk. Write the moves with spaces between them; 13 moves the top of peg 1 to peg 3."
        )


def _tower(size: Size) -> str:
    return "".join(str(disk) for disk in range(size[0], 0, -1))


class BlocksWorld(Puzzle):
    """Rearrange stacks of blocks, moving tops only: ``AB|C|>|CBA|``, answer ``12 12``.

    Stacks are separated by bars, blocks are listed from the bottom; 13 moves the top of stack 1 to stack 3.

    Args:
        min_blocks: fewest blocks, at least 2.
        max_blocks: most blocks, at most 5.
        stacks: how many stacks, 3 or 4.

    Raises:
        ValueError: if an option is out of its range.

    Example::

        >>> spec = {"size": [3, 3], "start": "AB|C|", "goal": "A|CB|", "optimum": 1}
        >>> BlocksWorld.check(spec, "12").quality, BlocksWorld.check(spec, "13 32").quality
        (1.0, 0.5)
    """

    start = "any"
    spelling = "[1-4]{2}"

    def __init__(self, min_blocks: int = 3, max_blocks: int = 4, stacks: int = 3) -> None:
        if not 2 <= min_blocks <= max_blocks <= 5:
            raise ValueError(
                f"`min_blocks` and `max_blocks` are {min_blocks} and {max_blocks}; they must be from 2 to 5."
            )
        if stacks not in (3, 4):
            raise ValueError(f"`stacks` is {stacks}; it must be 3 or 4.")
        self.min_blocks = min_blocks
        self.max_blocks = max_blocks
        self.stacks = stacks

    def draw_size(self, random: Random) -> Size:
        """Number of blocks, and of stacks."""
        return random.randint(self.min_blocks, self.max_blocks), self.stacks

    def draw_goal(self, random: Random, size: Size) -> str:
        """Blocks in any order, cut into stacks anywhere."""
        blocks, stacks = size
        letters = [chr(ord("A") + block) for block in range(blocks)]
        random.shuffle(letters)
        for cut in sorted(random.sample(range(blocks + stacks - 1), stacks - 1)):
            letters.insert(cut, "|")
        return "".join(letters)

    @staticmethod
    def origin(size: Size) -> str:
        """All blocks on stack 1."""
        return "".join(chr(ord("A") + block) for block in range(size[0])) + "|" * (size[1] - 1)

    @staticmethod
    def moves(size: Size, position: str) -> Iterator[tuple[str, str]]:
        """Any top onto any other stack."""
        for name, _, _, after in _shifts(position.split("|")):
            yield name, after

    @staticmethod
    def rules(spec: Spec) -> str:
        """Notation and rules."""
        return (
            "Stacks of blocks, separated by |, are listed from the bottom. Left of > is the start, right of it the"
            " goal. A move takes the top block of a stack to the top of another. Write the moves with spaces between"
            " them; 13 moves the top of stack 1 to stack 3."
        )
