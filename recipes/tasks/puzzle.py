"""Puzzles of moves from a start to a goal, small enough that all positions are known."""

import re
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from random import Random
from typing import Any, ClassVar, Literal

from litropy.recipes.tasks.task import GeneratedTask, Spec, Verdict

__all__ = ["Puzzle", "Start"]

Start = Literal["any", "first"]
Size = tuple[int, ...]

_MOST_MOVES = 1024


class Puzzle(GeneratedTask):
    """A puzzle; positions are strings, an answer is a list of moves with spaces between them.

    A problem holds ``size``, ``start``, ``goal`` and ``optimum``, the least number of moves.
    """

    start: Start
    spelling: ClassVar[str]
    """Pattern of a move."""

    @staticmethod
    @abstractmethod
    def origin(size: Size) -> str:
        """A position from which every other one of interest can be reached."""

    @staticmethod
    @abstractmethod
    def moves(size: Size, position: str) -> Iterator[tuple[str, str]]:
        """Legal moves, and where each leads."""

    @staticmethod
    def normal(move: str) -> str:
        """One spelling for a move that can be spelt in several ways."""
        return move

    @abstractmethod
    def draw_size(self, random: Random) -> Size:
        """Draw how large the puzzle is."""

    @abstractmethod
    def draw_goal(self, random: Random, size: Size) -> str:
        """Draw a goal."""

    def generate(self, random: Random) -> Spec:
        """Draw size, goal and start; the goal can be reached."""
        size = self.draw_size(random)
        goal = self.draw_goal(random, size)
        far = _distances(type(self), size, goal)
        start = self.origin(size)
        if self.start == "any":
            start = random.choice([position for position in far if position != goal])
        return {"size": list(size), "start": start, "goal": goal, "optimum": far[start]}

    @staticmethod
    def prompt(spec: Spec) -> str:
        """Start, goal, and a line's end."""
        return f"{spec['start']}>{spec['goal']}\n"

    @classmethod
    def solve(cls, spec: Spec, random: Random) -> str:
        """A shortest solution at random."""
        size, position = tuple(spec["size"]), spec["start"]
        far = _distances(cls, size, spec["goal"])
        chosen = []
        while position != spec["goal"]:
            nearer = [
                (move, then)
                for move, then in _atlas(cls, size)[position].items()
                if far.get(then, far[position]) < far[position]
            ]
            move, position = random.choice(nearer)
            chosen.append(move)
        return " ".join(chosen)

    @classmethod
    def check(cls, spec: Spec, answer: str) -> Verdict:
        """Play the moves; canonical is the way without its loops."""
        moves = [cls.normal(move) for move in answer.replace(",", " ").split()]
        atlas = _atlas(cls, tuple(spec["size"]))
        if not moves or len(moves) > _MOST_MOVES or not all(re.fullmatch(cls.spelling, move) for move in moves):
            return Verdict.wrong("not a list of moves")
        position = spec["start"]
        way: list[tuple[str, str]] = []  # moves, and the position before each
        seen = {position: 0}
        for count, move in enumerate(moves):
            then = atlas[position].get(move)
            if then is None:
                return Verdict.wrong(f"move {count + 1} ({move}) is illegal", " ".join(moves), count / len(moves))
            way.append((move, position))
            if then in seen:
                for _, gone in way[seen[then] + 1 :]:
                    del seen[gone]
                del way[seen[then] :]
            seen[then] = len(way)
            position = then
        canonical = " ".join(move for move, _ in way)
        if position != spec["goal"]:
            return Verdict.wrong("the goal is not reached", canonical, 1.0)
        return Verdict.right(canonical, spec["optimum"] / len(moves))


Kind = type[Puzzle]


@lru_cache(maxsize=64)
def _atlas(kind: Any, size: Size) -> dict[str, dict[str, str]]:
    """Every position that can be reached, with its moves and where they lead."""
    atlas: dict[str, dict[str, str]] = {}
    waiting = [kind.origin(size)]
    while waiting:
        position = waiting.pop()
        if position not in atlas:
            atlas[position] = dict(kind.moves(size, position))
            waiting.extend(atlas[position].values())
    return atlas


@lru_cache(maxsize=64)
def _sources(kind: Any, size: Size) -> dict[str, list[str]]:
    sources: dict[str, list[str]] = {}
    for position, moves in _atlas(kind, size).items():
        for then in moves.values():
            sources.setdefault(then, []).append(position)
    return sources


@lru_cache(maxsize=256)
def _distances(kind: Any, size: Size, goal: str) -> dict[str, int]:
    """Least number of moves to the goal, from each position that has a way there."""
    far = {goal: 0}
    waiting = deque([goal])
    sources = _sources(kind, size)
    while waiting:
        position = waiting.popleft()
        for before in sources.get(position, ()):
            if before not in far:
                far[before] = far[position] + 1
                waiting.append(before)
    return far


def distance(kind: Kind, size: Size, start: str, goal: str) -> int | None:
    """Least number of moves from one position to another; None if there is no way."""
    return _distances(kind, size, goal).get(start)
