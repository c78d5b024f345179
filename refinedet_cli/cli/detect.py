"""The command `refinedet detect`."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from refinedet_cli.cli.options import (
    OUTPUT,
    BatchOpt,
    DeviceOpt,
    JsonOpt,
    MultiScaleOpt,
    OptionalOutOpt,
    PrecisionOpt,
    QuietOpt,
    ScoreOpt,
    SourcesArg,
    WeightsOpt,
)
from refinedet_cli.cli.output import Output
from refinedet_cli.errors import DataError, PartialError, UsageError

if TYPE_CHECKING:
    from refinedet_cli.core.config import Classes
    from refinedet_cli.engine.detect import DetectedPicture, DetectResult, Progress
    from refinedet_cli.engine.predict import AnyPredictor

# With more pictures than this, only classes are listed; and of one picture, not more than its best detections.
_FEW_PICTURES = 20
_ROWS_OF_A_PICTURE = 12


def detect(
    sources: SourcesArg,
    out: OptionalOutOpt = None,
    no_draw: Annotated[
        bool, typer.Option("--no-draw", help="Write detections.json only.", rich_help_panel=OUTPUT)
    ] = False,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    weights: WeightsOpt = None,
    score: ScoreOpt = 0.3,
    multi_scale: MultiScaleOpt = None,
    device: DeviceOpt = "auto",
    precision: PrecisionOpt = None,
    batch: BatchOpt = None,
) -> None:
    """Find objects in pictures.

    With --out, that folder gets detections.json (a COCO data set with scores) and, in annotated, copies of the pictures
    with boxes drawn on them. Without it, the detections are only shown. A picture that cannot be read is listed and the
    rest goes on; the exit code is then 8.
    """
    from refinedet_cli.data.images import find_images

    output = Output(json=json, quiet=quiet)
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file", "name a folder")
    images = find_images(_named(sources))

    from refinedet_cli.engine.detect import detect as run
    from refinedet_cli.engine.device import describe_device, select_device
    from refinedet_cli.engine.multi_scale import remark_on_limits
    from refinedet_cli.engine.open_predictor import open_predictor
    from refinedet_cli.engine.predict import default_batch

    chosen = select_device(device)
    predictor = open_predictor(weights, device=chosen, precision=precision, multi_scale=multi_scale)
    draw = out is not None and not no_draw
    _announce(output, predictor, score=score, draw=draw)

    reports: deque[Progress] = deque(maxlen=1)
    with output.progress("Detecting") as bars:
        task = bars.add_task("", total=len(images))

        def show(progress: Progress) -> None:
            reports.append(progress)
            failed = f", {progress.failed} failed" if progress.failed else ""
            bars.update(
                task,
                completed=progress.done,
                total=progress.total,
                description=f"{_count(progress.objects, 'object')}{failed}",
            )

        try:
            result = run(
                predictor,
                images,
                out=out,
                score=score,
                batch=batch or default_batch(chosen),
                draw=draw,
                on_progress=show,
            )
        except KeyboardInterrupt:
            if out is not None and reports and (done := reports[0].done) > reports[0].failed:
                output.note(f"{out} holds what was found so far, in {done:,} of {reports[0].total:,} pictures")
            raise

    if result.skipped:
        output.note(
            f"left out {_count(result.skipped, 'annotated copy', 'annotated copies')} of an earlier run in {out}"
        )
    if remark := remark_on_limits(predictor, [(p.result.width, p.result.height) for p in result.pictures]):
        output.note(remark)
    output.result(_document(result, predictor.classes, describe_device(chosen)), *_tables(result, predictor.classes))
    if result.results_file is not None:
        copies = sum(picture.annotated is not None for picture in result.pictures)
        output.note(f"wrote {result.results_file}" + (f" and {_count(copies, 'annotated picture')}" if copies else ""))
    _judge(result)


def _named(sources: Sequence[str]) -> list[str]:
    """The sources, with ``-`` replaced by the lines of standard input."""
    named: list[str] = []
    for source in sources:
        named += [line for line in sys.stdin.read().splitlines() if line.strip()] if source == "-" else [source]
    return named


def _announce(output: Output, predictor: AnyPredictor, *, score: float, draw: bool) -> None:
    """Say before the work what is worth knowing of it."""
    from refinedet_cli.engine.draw import undrawable_names
    from refinedet_cli.engine.multi_scale import remark_on_passes

    if draw and (names := undrawable_names(predictor.classes)):
        output.warn(f"no font here can write {', '.join(names)}: drawn as # and the category id")
    if score < (kept := predictor.config.postprocess.score_threshold):
        output.note(f"this detector keeps nothing that scores below {kept:g}, so --score {score:g} acts like it")
    if remark := remark_on_passes(predictor):
        output.note(remark)


def _judge(result: DetectResult) -> None:
    """Raise the error that tells scripts how much went wrong."""
    failed = len({failure.path for failure in result.failures})
    if failed and not result.pictures:
        raise DataError(f"no picture could be read of {failed}", "the result lists the reasons")
    if failed:
        total = len({picture.path for picture in result.pictures} | {failure.path for failure in result.failures})
        raise PartialError(f"{failed} of {total} pictures failed", "the result lists the reasons")


def _document(result: DetectResult, classes: Classes, device: str) -> dict[str, Any]:
    return {
        "origin": result.origin,
        "device": device,
        "pictures": [_picture(picture, classes) for picture in result.pictures],
        "classes": result.counts,
        "objects": result.objects,
        "failures": [{"path": f.path, "file_name": f.file_name, "reason": f.reason} for f in result.failures],
        "skipped": result.skipped,
        "detections_file": result.results_file,
        "seconds": round(result.seconds, 3),
        "pictures_per_second": round(result.pictures_per_second, 2),
    }


def _picture(picture: DetectedPicture, classes: Classes) -> dict[str, Any]:
    from refinedet_cli.engine.results import detection_rows

    names = dict(zip(classes.category_ids, classes.names, strict=True))
    return {
        "id": picture.result.image_id,
        "path": picture.path,
        "file_name": picture.result.file_name,
        "width": picture.result.width,
        "height": picture.result.height,
        "annotated": picture.annotated,
        "detections": [
            {"class": names[category_id], "category_id": category_id, "score": score, "bbox": bbox}
            for bbox, score, category_id in detection_rows(picture.result.detections, classes)
        ],
    }


def _tables(result: DetectResult, classes: Classes) -> list[RenderableType]:
    tables: list[RenderableType] = []
    if 0 < len(result.pictures) <= _FEW_PICTURES:
        tables.append(_picture_table(result.pictures, classes))
    if result.counts:
        tables.append(_class_table(result))
    if result.failures:
        tables.append(_failure_table(result))
    with_objects = sum(len(picture.result.detections) > 0 for picture in result.pictures)
    found = (
        f"{_count(result.objects, 'object')} in {with_objects} of {_count(len(result.pictures), 'picture')}"
        if result.objects
        else f"nothing found in {_count(len(result.pictures), 'picture')}"
    )
    threshold = f"at a score of {result.origin.score_threshold:g} or better"
    schedule = result.origin.multi_scale
    passes = f", {_count(schedule.count, 'pass', 'passes')} a picture (multi-scale {schedule.name})" if schedule else ""
    # With many passes a picture can take seconds, and one decimal would say 0.0.
    speed = f"{result.pictures_per_second:.{2 if schedule else 1}f} pictures/s"
    return [*tables, Text(f"{found} {threshold}, {speed}{passes}")]


def _picture_table(pictures: Sequence[DetectedPicture], classes: Classes) -> Table:
    from refinedet_cli.engine.results import detection_rows

    names = dict(zip(classes.category_ids, classes.names, strict=True))
    table = Table(title="Pictures", title_justify="left")
    table.add_column("Picture", overflow="fold")
    table.add_column("Class", overflow="fold")
    for heading in ("Score", "Left", "Top", "Width", "Height"):
        table.add_column(heading, justify="right", no_wrap=True)
    for picture in pictures:
        # On a terminal a name stands once above its rows; in a pipe each row has to make sense alone.
        first, later = picture.result.file_name, "" if sys.stdout.isatty() else picture.result.file_name
        rows = detection_rows(picture.result.detections, classes)
        for i, (bbox, score, category_id) in enumerate(rows[:_ROWS_OF_A_PICTURE]):
            sides = (f"{side:.0f}" for side in bbox)
            table.add_row(later if i else first, names[category_id], f"{score:.2f}", *sides)
        if len(rows) > _ROWS_OF_A_PICTURE:
            table.add_row(later, f"and {len(rows) - _ROWS_OF_A_PICTURE} more", *[""] * 5, style="dim")
        if not rows:
            table.add_row(first, "nothing", *[""] * 5, style="dim")
        table.add_section()
    return table


def _class_table(result: DetectResult) -> Table:
    table = Table(title="Classes", title_justify="left")
    table.add_column("Class", overflow="fold")
    for heading in ("Pictures", "Objects", "Best score"):
        table.add_column(heading, justify="right", no_wrap=True)
    for count in result.counts:
        table.add_row(count.name, f"{count.pictures:,}", f"{count.objects:,}", f"{count.best_score:.2f}")
    return table


def _failure_table(result: DetectResult) -> Table:
    table = Table(title="Failed", title_justify="left", title_style="red")
    table.add_column("File", overflow="fold")
    table.add_column("Reason", overflow="fold")
    for failure in result.failures:
        table.add_row(str(failure.path), failure.reason)
    return table


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
