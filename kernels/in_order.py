"""Work for several threads whose results come in the order of the items, with few of them waiting."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

__all__ = ["in_order"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
# items that wait, small ones and others
_MOST_WAITING = 64


def in_order(
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    threads: int,
    is_small: Callable[[_Item], bool] = lambda item: False,
) -> Generator[_Result, None, None]:
    """What a function makes of each item, in their order.

    Args:
        function: should release the GIL for most of its time.
        items: taken one by one, ``threads`` + 1 ahead of what was asked for at most, beside small ones.
        threads: how many items at once; one works in the caller's thread, and nothing ahead.
        is_small: whether to hand an item over would take longer than its work, which is the caller's then.

    Yields:
        One result an item.

    Example:
        >>> list(in_order(len, ["", "ab", "c"], threads=2))
        [0, 2, 1]
    """
    if threads <= 1:
        yield from map(function, items)
        return
    waiting: deque[tuple[Callable[[], _Result], bool]] = deque()
    ahead = 0
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            small = is_small(item)
            waiting.append((partial(function, item) if small else pool.submit(function, item).result, small))
            ahead += not small
            while ahead > threads or len(waiting) > _MOST_WAITING:
                result, small = waiting.popleft()
                ahead -= not small
                yield result()
        while waiting:
            yield waiting.popleft()[0]()
