"""Work for several threads whose results come in the order of the items, with few of them waiting."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["in_order"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_order(
    function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int
) -> Generator[_Result, None, None]:
    """What a function makes of each item, in their order.

    Args:
        function: should release the GIL for most of its time.
        items: taken one by one, ``threads`` + 1 ahead of what was asked for at most.
        threads: how many items at once; one works in the caller's thread, and nothing ahead.

    Yields:
        One result an item.

    Example:
        >>> list(in_order(len, ["", "ab", "c"], threads=2))
        [0, 2, 1]
    """
    if threads <= 1:
        yield from map(function, items)
        return
    waiting: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
