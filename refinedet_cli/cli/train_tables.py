"""The results of `refinedet train` as tables, and as a document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from refinedet_cli.core.words import counted

if TYPE_CHECKING:
    from refinedet_cli.engine.dry_run import Forecast
    from refinedet_cli.engine.train import TrainResult


def number(value: float | None) -> str:
    """Write a score of the metric; a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"


def result_tables(result: TrainResult, out: Path, report: Path | None) -> list[Table | str]:
    """Say how a run ended, and where its weights and pages are."""
    table = Table(title=_title(result))
    for column in ("steps", "pictures", "minutes", "AP", "AP50", "AP75", "best AP"):
        table.add_column(column, justify="right")
    last = result.result
    table.add_row(
        f"{result.steps:,}",
        f"{result.pictures:,}",
        f"{result.seconds / 60:.1f}",
        *(number(value) for value in ((last.AP, last.AP50, last.AP75) if last else (None,) * 3)),
        number(result.best),
    )
    weights = out / ("best.safetensors" if result.best is not None else "last.safetensors")
    linked = "" if report is None else f", with {report}"
    return [table, f"weights: {weights}", f"page: {out / 'run.html'}{linked}"]


def _title(result: TrainResult) -> str:
    if not result.finished:
        return "Training, stopped to be resumed"
    return "Training, ended early: AP no longer rose" if result.ended_early else "Training"


def forecast_table(forecast: Forecast, *, drawn: bool = False) -> Table:
    """Say what a run would take; ``drawn`` tells that there is a preview nevertheless."""
    written = "nothing is written but the preview" if drawn else "nothing is written"
    table = Table(title=f"Dry run: {written}", show_header=False)
    table.add_column("what")
    table.add_column("figure")
    for what, figure in _forecast_rows(forecast):
        table.add_row(what, figure)
    return table


def _forecast_rows(forecast: Forecast) -> Iterator[tuple[str, str]]:
    height, width = forecast.input_size
    yield (
        "training data",
        f"{counted(forecast.pictures, 'picture')}, {counted(forecast.objects, 'object')}, "
        f"{counted(forecast.classes, 'class', 'classes')}",
    )
    validation = forecast.validation_pictures
    yield "validation data", "none" if validation is None else counted(validation, "picture")
    yield "input", f"{height} x {width}, batch {forecast.batch}"
    yield "parameters", f"{forecast.parameters:,}, of which {forecast.trainable:,} are trained"
    yield "length", f"{counted(forecast.steps, 'step')}, {forecast.epochs:.1f} epochs"
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
        yield "memory", f"{size(forecast.memory_bytes)} at most, of {forecast.memory_of}"
    yield "on disk", f"{size(forecast.checkpoint_bytes)} a weights file, {size(forecast.state_bytes)} resume state"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def size(count: int) -> str:
    """Write so many bytes for a person."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def result_document(result: TrainResult, out: Path, report: Path | None, config: dict[str, Any]) -> dict[str, Any]:
    """Write how a run ended as plain data."""
    last = result.result
    return {
        "finished": result.finished,
        "ended_early": result.ended_early,
        "steps": result.steps,
        "pictures": result.pictures,
        "seconds": round(result.seconds, 3),
        "best_AP": result.best,
        "AP": last.AP if last else None,
        "AP50": last.AP50 if last else None,
        "AP75": last.AP75 if last else None,
        "weights": str(out / ("best.safetensors" if result.best is not None else "last.safetensors")),
        "page": str(out / "run.html"),
        "report": None if report is None else str(report),
        "config": config,
    }
