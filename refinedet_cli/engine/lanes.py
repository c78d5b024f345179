"""Threads that each compute pictures of their own on one core, in place of sharing every layer out among the cores.

Sharing a layer costs a meeting of all threads at its end; of a light network, that is most of what a second core could
bring. Lanes never meet, also where other work has one of the cores. They finish more pictures a second, and each later.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def lanes_for(device: torch.device) -> int:
    """How many lanes a device has: the threads of torch on a CPU; one elsewhere, where the device shares work out."""
    return torch.get_num_threads() if device.type == "cpu" else 1


class Lanes:
    """Computes with so many threads, whose torch operators have one thread each.

    Args:
        count: of threads; 1 computes in the calling thread, with all threads that torch has there.

    Attributes:
        count: as given.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = None if count == 1 else _make_pool(count)

    def call(self, function: Callable[[], _Result]) -> _Result:
        """Call a function in one of the threads."""
        return function() if self._pool is None else self._pool.submit(function).result()

    def map(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
        """Call a function for each item: the results in order, or the first exception."""
        return [function(item) for item in items] if self._pool is None else [*self._pool.map(function, items)]


@lru_cache
def _make_pool(count: int) -> ThreadPoolExecutor:
    usual = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, thread_name_prefix="lane")
    all_there = threading.Barrier(count)

    def begin(_: int) -> None:
        all_there.wait()
        # Asked for its number, torch gives a new thread the usual one, which it would else do later.
        torch.get_num_threads()
        torch.set_num_threads(1)

    list(pool.map(begin, range(count)))
    # That is also what threads get which torch has not seen yet: theirs stays as it was.
    torch.set_num_threads(usual)
    return pool
