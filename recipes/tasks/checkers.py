"""Checker jumping."""

from collections.abc import Iterator
from random import Random

from litropy.recipes.tasks.puzzle import Puzzle, Size, Start
from litropy.recipes.tasks.task import Spec

__all__ = ["CheckerJumping"]


class CheckerJumping(Puzzle):
    """Swap two colours on a row with one free cell: ``RR_BB>BB_RR``, answer ``2 4 5 3 1 2 4 3``.

    R moves right and B left, one step into the free cell, or over one checker of the other colour. A move is the cell
    that the checker comes from; r and b checkers take (r + 1) (b + 1) - 1 moves from the first position.

    Args:
        min_each: fewest checkers of a colour, at least 1.
        max_each: most checkers of a colour, at most 4.
        start: any position that can still be solved, or first, the colours on their sides.

    Raises:
        ValueError: if the number of checkers is out of its range.

    Example::

        >>> spec = {"size": [1, 1], "start": "R_B", "goal": "B_R", "optimum": 3}
        >>> CheckerJumping.check(spec, "1 3 2").correct
        True
    """

    spelling = "[1-9]"

    def __init__(self, min_each: int = 1, max_each: int = 3, start: Start = "any") -> None:
        if not 1 <= min_each <= max_each <= 4:
            raise ValueError(f"`min_each` and `max_each` are {min_each} and {max_each}; they must be from 1 to 4.")
        self.min_each = min_each
        self.max_each = max_each
        self.start = start

    def draw_size(self, random: Random) -> Size:
        """Numbers of red and of blue checkers."""
        return random.randint(self.min_each, self.max_each), random.randint(self.min_each, self.max_each)

    def draw_goal(self, random: Random, size: Size) -> str:
        """The colours swapped."""
        return "B" * size[1] + "_" + "R" * size[0]

    @staticmethod
    def origin(size: Size) -> str:
        """The colours on their sides."""
        return "R" * size[0] + "_" + "B" * size[1]

    @staticmethod
    def moves(size: Size, position: str) -> Iterator[tuple[str, str]]:
        """Steps and jumps into the free cell."""
        free = position.index("_")
        for source in (free - 2, free - 1, free + 1, free + 2):
            if not 0 <= source < len(position) or position[source] != ("R" if source < free else "B"):
                continue
            if abs(source - free) == 2 and position[(source + free) // 2] == position[source]:
                continue
            after = list(position)
            after[free], after[source] = after[source], "_"
            yield str(source + 1), "".join(after)

    @staticmethod
    def rules(spec: Spec) -> str:
        """Notation and rules."""
        return (
            "Checkers R and B stand on a row with one free cell _. Left of > is the start, right of it the goal. R"
            " moves to the right and B to the left: one step into the free cell, or over exactly one checker of the"
            " other colour into it. Write the cell, counted from 1, that each move starts from, with spaces"
            " between them."
        )
