"""What `refinedet train` shows while it runs, and how it is asked to stop."""

from __future__ import annotations

import math
import signal
import time
from typing import TYPE_CHECKING, Any

from rich.progress import TaskID

from refinedet_cli.cli.output import Bars, Output
from refinedet_cli.cli.train_replay import diagnosis_lines
from refinedet_cli.cli.train_tables import number
from refinedet_cli.core.words import counted, pace

if TYPE_CHECKING:
    from refinedet_cli.engine.run_log import StepReport
    from refinedet_cli.engine.train import EvaluationReport, Report, ResumeReport


class Stop:
    """Makes of Ctrl-C, SIGTERM and the time limit a stop between two steps; a second Ctrl-C acts at once."""

    def __init__(self, seconds: float) -> None:
        self.interrupted = False
        self._end = time.monotonic() + seconds if seconds else math.inf
        self._before: dict[signal.Signals, Any] = {}

    def wanted(self) -> bool:
        """Tell whether to stop after this step."""
        return self.interrupted or time.monotonic() > self._end

    def was_interrupted(self) -> bool:
        """Tell whether a person or the system asked for it."""
        return self.interrupted

    def __enter__(self) -> Stop:
        for which in (signal.SIGINT, signal.SIGTERM):
            self._before[which] = signal.signal(which, self._stop)
        return self

    def __exit__(self, *exception: object) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)

    def _stop(self, number: int, frame: object) -> None:
        # SIGTERM may come twice from one stop: once for the process, and once for all of its job.
        if self.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.interrupted = True


class Reporter:
    """Turns reports into one bar and a line for each evaluation."""

    def __init__(self, output: Output, bars: Bars) -> None:
        self.output, self.bars = output, bars
        self._cache: TaskID | None = None
        self._steps: TaskID | None = None

    def __call__(self, report: Report) -> None:
        """Show a report."""
        from refinedet_cli.engine.diagnosis import Diagnosis
        from refinedet_cli.engine.run_log import StepReport
        from refinedet_cli.engine.train import CacheReport, ResumeReport
        from refinedet_cli.engine.watch import HealthReport

        if isinstance(report, HealthReport):
            self.output.warn(f"step {report.step:,}: {report.message}; {report.cure}")
        elif isinstance(report, Diagnosis):
            self.output.warn(diagnosis_lines(report))
        elif isinstance(report, ResumeReport):
            self.output.note(_resume_line(report))
        elif isinstance(report, CacheReport):
            if self._cache is None:
                self._cache = self.bars.add_task("reading pictures", total=report.total)
            self.bars.update(self._cache, completed=report.done, visible=report.done < report.total)
        elif isinstance(report, StepReport):
            if self._steps is None:
                self._steps = self.bars.add_task("", total=report.steps)
            self.bars.detail = _step_detail(report)
            self.bars.update(self._steps, completed=report.step, description=f"epoch {report.epoch:.1f}")
        else:
            self.output.note(_evaluation_line(report))
            if report.ends_run:
                self.output.note(_end_line(report))


def _resume_line(report: ResumeReport) -> str:
    place = f"step {report.step:,} of {report.steps:,} (epoch {report.epoch:.1f} of {report.epochs:.1f})"
    if report.is_done:
        return f"resume: the run has ended after {place}; there is nothing left to train"
    return f"resume: going on after {place}"


def _step_detail(report: StepReport) -> str:
    parts = ", ".join(f"{name} {value:.2f}" for name, value in report.parts.items())
    positives = ", ".join(f"{name} {value:.0f}" for name, value in report.positives.items())
    return (
        f"loss {report.total:.2f} ({parts}), positives a picture {positives}, "
        f"lr {report.lr:.1e}, {pace(report.pictures_per_second)} pictures/s"
    )


def _evaluation_line(report: EvaluationReport) -> str:
    best = "  best so far" if report.is_best else ""
    return f"epoch {report.epoch:.0f}: AP {number(report.result.AP)}  AP50 {number(report.result.AP50)}{best}"


def _end_line(report: EvaluationReport) -> str:
    count = counted(report.without_gain, "evaluation", "evaluations in a row")
    return f"the run ends here, as train.patience asks: {count} without a better AP than {number(report.best)}"
