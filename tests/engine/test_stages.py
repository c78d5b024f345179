"""The clock of stages: what it counts, and what it leaves alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest

from refinedet_cli.engine import stages as module
from refinedet_cli.engine.stages import Stages, measured_by, no_clock, stage


class Watch:
    """A clock that goes on only when it is told to, for each thread by itself."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __call__(self) -> float:
        return getattr(self._local, "now", 0.0)

    def go(self, seconds: float) -> None:
        self._local.now = self() + seconds


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch()
    monkeypatch.setattr(module.time, "perf_counter", watch)
    return watch


def test_times_of_a_stage_add_up(watch: Watch) -> None:
    clock = Stages()
    for seconds in (1.0, 2.0):
        with clock("network"):
            watch.go(seconds)
        watch.go(10)
    assert clock.seconds("network") == 3
    assert clock.seconds("prepare") == 0


def test_an_inner_stage_interrupts_the_outer_one(watch: Watch) -> None:
    clock = Stages()
    with clock("network"):
        watch.go(1)
        with clock("prepare"):
            watch.go(2)
            with clock("network"):
                watch.go(4)
        watch.go(8)
        with clock("post-processing"):
            watch.go(16)
    assert [clock.seconds(name) for name in ("network", "prepare", "post-processing")] == [13, 2, 16]


def test_an_error_ends_the_stage(watch: Watch) -> None:
    clock = Stages()

    def fail() -> None:
        with clock("network"), clock("prepare"):
            watch.go(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    watch.go(5)
    with clock("record"):
        watch.go(2)
    assert [clock.seconds(name) for name in ("network", "prepare", "record")] == [0, 1, 2]


def test_threads_add_up_and_do_not_interrupt_one_another(watch: Watch) -> None:
    clock, together = Stages(), threading.Barrier(4)

    def work() -> None:
        together.wait()
        for _ in range(500):
            with clock("read"):
                watch.go(0.5)

    with ThreadPoolExecutor(4) as pool, clock("network"):
        futures = [pool.submit(work) for _ in range(4)]
        for future in futures:
            future.result()
        watch.go(3)
    assert clock.seconds("read") == 4 * 500 * 0.5
    assert clock.seconds("network") == 3


def test_the_device_is_waited_for_at_each_end_and_only_by_the_thread_that_computes(watch: Watch) -> None:
    waited: list[int] = []

    def wait() -> None:
        waited.append(threading.get_ident())
        watch.go(1)

    clock = Stages(wait)
    with clock("network"):
        pass
    # Work that was under way before is not the stage's; what it began is.
    assert clock.seconds("network") == 1
    assert len(waited) == 2
    with ThreadPoolExecutor(1) as pool:

        def read() -> None:
            with clock("read"):
                pass

        pool.submit(read).result()
    assert set(waited) == {threading.get_ident()}
    assert clock.seconds("read") == 0


def test_a_stage_goes_to_the_clock_that_is_set(watch: Watch) -> None:
    outer, inner = Stages(), Stages()
    with stage("network"):
        watch.go(1)
    with measured_by(outer):
        with stage("network"):
            watch.go(2)
        with measured_by(inner), stage("network"):
            watch.go(4)
        with measured_by(no_clock), stage("network"):
            watch.go(8)
    with stage("network"):
        watch.go(16)
    assert (outer.seconds("network"), inner.seconds("network")) == (2, 4)


def test_a_thread_measures_for_the_clock_of_the_context_that_it_is_given(watch: Watch) -> None:
    def read() -> None:
        with stage("read"):
            watch.go(1)

    clock = Stages()
    with ThreadPoolExecutor(1) as pool, measured_by(clock):
        pool.submit(copy_context().run, read).result()
        assert clock.seconds("read") == 1


def test_without_a_clock_nothing_is_made() -> None:
    assert stage("network") is stage("read")
