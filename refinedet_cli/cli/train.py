"""`refinedet train`."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import TaskID
from rich.table import Table

from refinedet_cli.cli.downloads import downloads
from refinedet_cli.cli.options import (
    MODEL,
    OUTPUT,
    RUNTIME,
    BackboneWeightsOpt,
    BatchOpt,
    ConfigOpt,
    DataOpt,
    DeviceOpt,
    ImagesOpt,
    JsonOpt,
    OfflineOpt,
    PrecisionOpt,
    PresetOpt,
    QuietOpt,
    RootOpt,
    SeedOpt,
    SetOpt,
    ValOpt,
    WeightsOpt,
    WorkersOpt,
)
from refinedet_cli.cli.output import Bars, Output
from refinedet_cli.errors import UsageError

if TYPE_CHECKING:
    from refinedet_cli.engine.dry_run import Forecast
    from refinedet_cli.engine.run_log import StepReport
    from refinedet_cli.engine.train import EvaluationReport, Report, TrainResult


def train(
    data: DataOpt = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder of the run; only --dry-run needs none.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    val: ValOpt = None,
    images: ImagesOpt = None,
    root: RootOpt = None,
    weights: WeightsOpt = None,
    backbone_weights: BackboneWeightsOpt = None,
    offline: OfflineOpt = False,
    preset: PresetOpt = None,
    config: ConfigOpt = None,
    settings: SetOpt = None,
    anchors: Annotated[
        Path | None,
        typer.Option(
            "--anchors",
            metavar="FILE.toml",
            help="Anchors that refinedet anchors wrote; they override those of --config.",
            show_default="those of the config",
            rich_help_panel=MODEL,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs",
            min=1,
            metavar="N",
            help="Passes over the data.",
            show_default="of the config",
            rich_help_panel=RUNTIME,
        ),
    ] = None,
    batch: BatchOpt = None,
    device: DeviceOpt = "auto",
    precision: PrecisionOpt = None,
    workers: WorkersOpt = None,
    seed: SeedOpt = None,
    cache: Annotated[
        bool | None,
        typer.Option(
            "--cache/--no-cache",
            help="Keep all decoded pictures in memory.",
            show_default="if they take at most a quarter of the free memory",
            rich_help_panel=RUNTIME,
        ),
    ] = None,
    stop_after: Annotated[
        float,
        typer.Option(
            "--stop-after",
            min=0.0,
            metavar="MINUTES",
            help="Stop cleanly after so long, to go on with --resume.",
            show_default="run to the end",
            rich_help_panel=RUNTIME,
        ),
    ] = 0.0,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --out from where it stopped.", rich_help_panel=OUTPUT),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the run in --out.", rich_help_panel=OUTPUT),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Measure a few steps, say what the run would take, and write nothing.",
            rich_help_panel=RUNTIME,
        ),
    ] = False,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Train a detector on your own pictures.

    It starts from the bundled detector unless told otherwise, so that a few hundred pictures and no network are enough.
    A run file given with --config may name data, start and settings; examples/recipes holds those of the paper.
    The folder receives best.safetensors and last.safetensors for detect, eval and export, the resolved config.json,
    log.csv, metrics.csv, and what --resume needs.
    """
    from refinedet_cli.engine import training_session
    from refinedet_cli.engine.anchor_file import read_anchor_file
    from refinedet_cli.engine.data_check import check_training

    if out is None and not dry_run:
        raise UsageError("--out is missing", "name a folder for the run; only --dry-run needs none")
    output = Output(json=json, quiet=quiet)
    # Epochs asked for by name take the place of steps that a run file asks for.
    overrides = {"epochs": epochs, "steps": epochs and 0, "batch": batch, "precision": precision, "seed": seed}
    fitted = None if anchors is None else read_anchor_file(anchors)
    with downloads(output, offline=offline):
        session = training_session.prepare(
            data=data or [],
            val=val,
            images=images,
            root=root,
            out=out,
            weights=weights,
            backbone_weights=backbone_weights,
            preset=preset,
            config=config,
            settings=[
                *(fitted.settings if fitted else []),
                *(settings or []),
                *(f"train.{k}={v}" for k, v in overrides.items() if v is not None),
            ],
            device=device,
            workers=workers,
            cache=cache,
            resume=resume,
            overwrite=overwrite,
        )
    for note in session.notes:
        output.note(note)
    for severity, line in check_training(session.data, session.validation, session.preset.detector):
        if severity == "note":
            output.note(f"data: {line}")
        else:
            output.warn(line)
    mismatch = fitted and fitted.mismatch(session.preset.detector)
    if mismatch:
        output.warn(mismatch)
    if out is None or dry_run:
        output.note("measuring a few steps")
        forecast = session.forecast()
        output.result({"dry_run": forecast, "config": session.settings}, _forecast_table(forecast))
        return
    with output.progress("train") as bars, _Stop(stop_after * 60) as stop:
        result = session.run(_Reporter(output, bars), stop.wanted)
    if stop.interrupted and not result.finished:
        output.note(f"stopped after step {result.steps}; go on with the same command and --resume")
        raise KeyboardInterrupt
    output.result(_document(result, out, session.settings), *_tables(result, out))


class _Stop:
    """Makes of Ctrl-C, SIGTERM and the time limit a stop between two steps; a second Ctrl-C acts at once."""

    def __init__(self, seconds: float) -> None:
        self.interrupted = False
        self._end = time.monotonic() + seconds if seconds else math.inf
        self._before: dict[signal.Signals, Any] = {}

    def wanted(self) -> bool:
        return self.interrupted or time.monotonic() > self._end

    def __enter__(self) -> _Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True


class _Reporter:
    """Turns reports into one bar and a line for each evaluation."""

    def __init__(self, output: Output, bars: Bars) -> None:
        self.output, self.bars = output, bars
        self._cache: TaskID | None = None
        self._steps: TaskID | None = None

    def __call__(self, report: Report) -> None:
        from refinedet_cli.engine.run_log import StepReport
        from refinedet_cli.engine.train import CacheReport

        if isinstance(report, CacheReport):
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


def _step_detail(report: StepReport) -> str:
    parts = ", ".join(f"{name} {value:.2f}" for name, value in report.parts.items())
    positives = ", ".join(f"{name} {value:.0f}" for name, value in report.positives.items())
    return (
        f"loss {report.total:.2f} ({parts}), positives a picture {positives}, "
        f"lr {report.lr:.1e}, {report.pictures_per_second:.0f} pictures/s"
    )


def _evaluation_line(report: EvaluationReport) -> str:
    best = "  best so far" if report.is_best else ""
    return f"epoch {report.epoch:.0f}: AP {_number(report.result.AP)}  AP50 {_number(report.result.AP50)}{best}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _tables(result: TrainResult, out: Path) -> list[Table | str]:
    table = Table(title="Training" if result.finished else "Training, stopped to be resumed")
    for column in ("steps", "pictures", "minutes", "AP", "AP50", "AP75", "best AP"):
        table.add_column(column, justify="right")
    last = result.result
    table.add_row(
        str(result.steps),
        f"{result.pictures:,}",
        f"{result.seconds / 60:.1f}",
        *(_number(value) for value in ((last.AP, last.AP50, last.AP75) if last else (None,) * 3)),
        _number(result.best),
    )
    return [table, f"weights: {out / 'best.safetensors' if result.best is not None else out / 'last.safetensors'}"]


def _forecast_table(forecast: Forecast) -> Table:
    table = Table(title="Dry run: nothing is written", show_header=False)
    table.add_column("what")
    table.add_column("figure")
    for what, figure in _forecast_rows(forecast):
        table.add_row(what, figure)
    return table


def _forecast_rows(forecast: Forecast) -> Iterator[tuple[str, str]]:
    height, width = forecast.input_size
    yield "training data", f"{forecast.pictures:,} pictures, {forecast.objects:,} objects, {forecast.classes} classes"
    validation = forecast.validation_pictures
    yield "validation data", "none" if validation is None else f"{validation:,} pictures"
    yield "input", f"{height} x {width}, batch {forecast.batch}"
    yield "parameters", f"{forecast.parameters:,}, of which {forecast.trainable:,} are trained"
    yield "length", f"{forecast.steps:,} steps, {forecast.epochs:.1f} epochs"
    drops = ", ".join(f"{step:,}" for step in forecast.milestones)
    yield "learning rate", f"{forecast.lr:g}" + (f", lower after {drops} steps" if drops else "")
    yield (
        "a step",
        f"{forecast.step_seconds:.3g} s (median of {forecast.measured_steps}); "
        f"reading a batch takes one process {forecast.loading_seconds:.3g} s of it",
    )
    yield "training", f"{_hours(forecast.training_hours)}, without evaluation"
    if forecast.evaluation_hours is not None:
        yield (
            "with evaluation",
            f"{_hours(forecast.training_hours + forecast.evaluation_hours)}, "
            f"scoring the validation data {_times(forecast.evaluations)}",
        )
    if forecast.memory_bytes is not None:
        yield "memory", f"{_size(forecast.memory_bytes)} at most, of {forecast.memory_of}"
    yield "on disk", f"{_size(forecast.checkpoint_bytes)} a weights file, {_size(forecast.state_bytes)} resume state"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _document(result: TrainResult, out: Path, config: dict[str, Any]) -> dict[str, Any]:
    last = result.result
    return {
        "finished": result.finished,
        "steps": result.steps,
        "pictures": result.pictures,
        "seconds": round(result.seconds, 3),
        "best_AP": result.best,
        "AP": last.AP if last else None,
        "AP50": last.AP50 if last else None,
        "AP75": last.AP75 if last else None,
        "weights": str(out / ("best.safetensors" if result.best is not None else "last.safetensors")),
        "config": config,
    }
