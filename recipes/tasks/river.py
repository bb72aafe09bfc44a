"""River crossing of actors and their agents."""

from collections.abc import Iterator
from itertools import combinations
from random import Random

from litropy.recipes.tasks.puzzle import Puzzle, Size, Start, distance
from litropy.recipes.tasks.task import Spec

__all__ = ["RiverCrossing"]


class RiverCrossing(Puzzle):
    """Bring actors and their agents across a river: ``2:aAbB*|>|*aAbB``, answer ``ab a AB A aA``.

    An actor (a, b, ...) may not be with another's agent (A, B, ...) unless their own is there too, on either bank and
    in the boat. The boat (*) holds as many as the number before the colon says, and never crosses empty. A move names
    who is in it. Sizes that have no solution, such as 4 pairs with a boat for 2, are never drawn.

    Args:
        min_pairs: fewest pairs, at least 2.
        max_pairs: most pairs, at most 6.
        min_boat: smallest boat, at least 2.
        max_boat: largest boat, at most 4.
        start: any position that can be solved, or first, everybody on the left.

    Raises:
        ValueError: if an option is out of its range, or no size that they allow has a solution.

    Example::

        >>> spec = {"size": [2, 2], "start": "aAbB*|", "goal": "|*aAbB", "optimum": 5}
        >>> RiverCrossing.check(spec, "ab a AB A aA").correct
        True
        >>> RiverCrossing.check(spec, "aA A aB").reason
        'move 3 (aB) is illegal'
    """

    spelling = "[a-fA-F]{1,4}"

    def __init__(
        self, min_pairs: int = 2, max_pairs: int = 3, min_boat: int = 2, max_boat: int = 2, start: Start = "any"
    ) -> None:
        if not 2 <= min_pairs <= max_pairs <= 6:
            raise ValueError(f"`min_pairs` and `max_pairs` are {min_pairs} and {max_pairs}; they must be from 2 to 6.")
        if not 2 <= min_boat <= max_boat <= 4:
            raise ValueError(f"`min_boat` and `max_boat` are {min_boat} and {max_boat}; they must be from 2 to 4.")
        self.start = start
        sizes = [(p, b) for p in range(min_pairs, max_pairs + 1) for b in range(min_boat, max_boat + 1)]
        self.sizes = [size for size in sizes if distance(type(self), size, self.origin(size), _goal(size)) is not None]
        if not self.sizes:
            raise ValueError(
                f"No river crossing has a solution among those of (pairs, boat) {sizes}; allow a larger boat."
            )

    def draw_size(self, random: Random) -> Size:
        """Pairs, and places in the boat."""
        return random.choice(self.sizes)

    def draw_goal(self, random: Random, size: Size) -> str:
        """Everybody on the right."""
        return _goal(size)

    @staticmethod
    def origin(size: Size) -> str:
        """Everybody on the left."""
        return _write(frozenset(_people(size)), frozenset(), True)

    @staticmethod
    def moves(size: Size, position: str) -> Iterator[tuple[str, str]]:
        """Every crossing that leaves all three places safe."""
        left_text, _, right_text = position.partition("|")
        boat_left = "*" in left_text
        left, right = frozenset(left_text) - {"*"}, frozenset(right_text) - {"*"}
        here, there = (left, right) if boat_left else (right, left)
        for number in range(1, size[1] + 1):
            for crew in combinations(sorted(here), number):
                rest, arrived = here.difference(crew), there.union(crew)
                if _safe(frozenset(crew)) and _safe(rest) and _safe(arrived):
                    banks = (rest, arrived) if boat_left else (arrived, rest)
                    yield _in_order(crew), _write(*banks, not boat_left)

    @staticmethod
    def normal(move: str) -> str:
        """People in alphabetical order, the actor before the agent."""
        return _in_order(move)

    @staticmethod
    def prompt(spec: Spec) -> str:
        """Places in the boat, start, goal, and a line's end."""
        return f"{spec['size'][1]}:{spec['start']}>{spec['goal']}\n"

    @staticmethod
    def rules(spec: Spec) -> str:
        """Notation and rules."""
        return (
            "Actors a, b, ... and their agents A, B, ... cross a river |; the boat * holds as many people as the number"
            " before the colon says, and never crosses empty. Left of > is the start, right of it the goal. On either"
            " bank and in the boat, an actor may not be with another actor's agent unless the actor's own agent is"
            " there too. Write who is in the boat at each crossing, with spaces between the crossings: aA a."
        )


def _people(size: Size) -> list[str]:
    return [letter for pair in range(size[0]) for letter in (chr(ord("a") + pair), chr(ord("A") + pair))]


def _goal(size: Size) -> str:
    return _write(frozenset(), frozenset(_people(size)), False)


def _in_order(people: str | tuple[str, ...] | frozenset[str]) -> str:
    return "".join(sorted(people, key=lambda person: (person.lower(), person.isupper())))


def _write(left: frozenset[str], right: frozenset[str], boat_left: bool) -> str:
    return f"{_in_order(left)}{'*' if boat_left else ''}|{'' if boat_left else '*'}{_in_order(right)}"


def _safe(people: frozenset[str]) -> bool:
    agents = {person.lower() for person in people if person.isupper()}
    return not agents or all(person in agents for person in people if person.islower())
