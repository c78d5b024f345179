"""What explains a run in its folder, beside weights, state and logs: environment, page and TensorBoard files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from refinedet_cli.engine.environment import ENVIRONMENT_FILE, Outcome, StartLog, describe_environment
from refinedet_cli.engine.results import RESULTS_NAME
from refinedet_cli.engine.run_log import StepReport
from refinedet_cli.engine.run_page import PAGE_NAME, write_run_page
from refinedet_cli.engine.run_record import EVENTS_FOLDER, VALIDATION_FOLDER, VALIDATION_METRICS, VALIDATION_REPORT
from refinedet_cli.engine.tensorboard import EventFiles, drop_events
from refinedet_cli.engine.watch import HealthReport
from refinedet_cli.errors import RefineDetError
from refinedet_cli.metrics.coco import CocoResult

R = TypeVar("R")
T = TypeVar("T")

_PROBLEM = "page-not-written"
# Of the time of a run, so much at most goes into its page.
_SHARE_OF_TIME = 0.02


class RunFolder:
    """Explains a run in its folder; of the processes that train together only the first may call it.

    `begin` comes first and `end` last; before `begin`, all others do nothing. None of it is needed for the run: what
    cannot be written is told once, and the run goes on.

    Args:
        out: the folder.
        command: program and arguments as typed; may be empty.
        tensorboard: whether event files are wanted as well.
        on_problem: called with what could not be written.
    """

    def __init__(
        self, out: Path, command: Sequence[str], *, tensorboard: bool, on_problem: Callable[[HealthReport], None]
    ) -> None:
        self.out, self._command = out, tuple(command)
        self._tensorboard, self._on_problem = tensorboard, on_problem
        self._starts: StartLog | None = None
        self._events: EventFiles | None = None
        self._page_due = 0.0
        self._has_told = False
        self._step = 0

    def clear(self) -> None:
        """Drop what explains an earlier run in this folder."""
        validation = [f"{VALIDATION_FOLDER}/{name}" for name in (VALIDATION_REPORT, VALIDATION_METRICS, RESULTS_NAME)]
        for name in (PAGE_NAME, ENVIRONMENT_FILE, *validation):
            (self.out / name).unlink(missing_ok=True)
        drop_events(self.out / EVENTS_FOLDER)

    def begin(self, step: int, *, device: torch.device, precision: str, processes: int) -> None:
        """Write down where the run is started or resumed.

        Args:
            step: optimiser steps done.
            device: where it computes.
            precision: of the network.
            processes: that train together.

        Raises:
            UsageError: event files are wanted, and the package tensorboard is not installed.
        """
        self._step = step
        if self._tensorboard:
            self._events = EventFiles(self.out / EVENTS_FOLDER, step)
        environment = describe_environment(device, precision, processes)
        self._starts = self._written(lambda: StartLog(self.out, environment, self._command, step))

    def passing(self, listener: Callable[[R], None]) -> Callable[[R], None]:
        """Make a function that takes the reports of the run in and passes them on."""

        def take(report: R) -> None:
            self._take(report)
            listener(report)

        return take

    def _take(self, report: object) -> None:
        if isinstance(report, StepReport):
            self._step = report.step
            if self._events is not None:
                self._events.steps(report)

    def evaluation(self, step: int, result: CocoResult) -> None:
        """Take an evaluation in; the page shows it after the next save."""
        self._page_due = 0.0
        if self._events is not None:
            self._events.evaluation(step, result)

    def saved(self, step: int) -> None:
        """Bring environment and page up to date; to be called whenever weights and state were saved."""
        self._step = step
        starts = self._starts
        if starts is not None:
            self._written(lambda: starts.seen(step))
        if starts is not None and time.monotonic() >= self._page_due:
            self._write_page()

    def end(self, outcome: Outcome, step: int | None = None) -> None:
        """Tell how this start ended, after ``step`` steps (those of the last report if None); the last page."""
        if self._events is not None:
            self._events.close()
        starts, last = self._starts, self._step if step is None else step
        if starts is not None:
            self._written(lambda: starts.ended(last, outcome))
            self._write_page()

    def _write_page(self) -> None:
        began = time.monotonic()
        self._written(lambda: write_run_page(self.out))
        now = time.monotonic()
        self._page_due = now + (now - began) / _SHARE_OF_TIME

    def _written(self, write: Callable[[], T]) -> T | None:
        """Write something; what keeps it from being written is told once, whatever it is: no run shall end by it."""
        try:
            return write()
        except Exception as error:
            if not self._has_told:
                self._has_told = True
                message, hint = (
                    (error.message, error.hint)
                    if isinstance(error, RefineDetError)
                    else (f"{type(error).__name__}: {error}", None)
                )
                cure = hint or "this is a bug, please report it; the run goes on"
                self._on_problem(HealthReport(self._step, _PROBLEM, f"the run is not explained: {message}", cure))
        return None
