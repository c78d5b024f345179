"""Where the time of a run goes: a clock of named stages, which costs nothing where nobody asks for it."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Literal

StageName = Literal[
    "read",
    "wait for pictures",
    "prepare",
    "network",
    "post-processing",
    "record",
    "draw and write",
    "wait for drawing",
    "wait for processes",
    "outputs",
]
# Given the name of a stage, it makes what a `with` block of that stage needs.
Clock = Callable[[StageName], AbstractContextManager[None]]

_NOTHING = nullcontext()


def no_clock(name: StageName) -> AbstractContextManager[None]:
    """Measure nothing."""
    return _NOTHING


class Stages:
    """A clock of the stages of one run, for any number of threads; it is a `Clock`.

    A stage within another one of the same thread interrupts it, so no second of a thread is counted twice.

    Args:
        synchronise: waits until the device has done what it was told, for the thread that makes this clock; None where
            nothing runs on behind.
    """

    def __init__(self, synchronise: Callable[[], None] | None = None) -> None:
        self._synchronise = synchronise
        self._owner = threading.get_ident()
        self._lock = threading.Lock()
        self._seconds: defaultdict[StageName, float] = defaultdict(float)
        self._thread = _Thread()

    @contextmanager
    def __call__(self, name: StageName) -> Iterator[None]:
        """Count the time of a `with` block as that of a stage."""
        running = self._thread.running
        self._charge()
        running.append(name)
        try:
            yield
        finally:
            self._charge()
            running.pop()

    def seconds(self, name: StageName) -> float:
        """How long the threads together have been in a stage; 0 where none was."""
        with self._lock:
            return self._seconds[name]

    def _charge(self) -> None:
        """Give the time since the last change to the stage that this thread is in."""
        if self._synchronise is not None and threading.get_ident() == self._owner:
            self._synchronise()
        now = time.perf_counter()
        if self._thread.running:
            with self._lock:
                self._seconds[self._thread.running[-1]] += now - self._thread.since
        self._thread.since = now


class _Thread(threading.local):
    """The stages that a thread is in, innermost last, and since when nothing was charged to it."""

    def __init__(self) -> None:
        self.running: list[StageName] = []
        self.since = 0.0


_current: ContextVar[Clock] = ContextVar("clock of stages", default=no_clock)


def stage(name: StageName) -> AbstractContextManager[None]:
    """Make a `with` block a stage for the clock that `measured_by` has set; without one, nothing is measured."""
    return _current.get()(name)


@contextmanager
def measured_by(clock: Clock) -> Iterator[None]:
    """Let a clock measure the stages that this thread comes through within a `with` block, however deep."""
    token = _current.set(clock)
    try:
        yield
    finally:
        _current.reset(token)
