"""The command `refinedet detect`."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from refinedet_cli.cli.detect_video import PassedOver, detect_videos, videos_of
from refinedet_cli.cli.downloads import on_disk
from refinedet_cli.cli.fitted_table import FittedTable
from refinedet_cli.cli.options import (
    DATA,
    MODEL,
    OUTPUT,
    RUNTIME,
    BatchOpt,
    DeviceName,
    DeviceOpt,
    JsonOpt,
    MultiScaleOpt,
    OfflineOpt,
    OptionalOutOpt,
    PrecisionName,
    PrecisionOpt,
    QuietOpt,
    ScoreOpt,
    SourcesArg,
    TileOpt,
    TileOverlapOpt,
    WeightsOpt,
    refuse_file,
)
from refinedet_cli.cli.output import Output
from refinedet_cli.core.words import counted, joined, pace
from refinedet_cli.errors import DataError, PartialError, UsageError

if TYPE_CHECKING:
    from refinedet_cli.core.config import Classes
    from refinedet_cli.data.listing import ImageList
    from refinedet_cli.engine.detect import DetectOptions, DetectResult, Progress
    from refinedet_cli.engine.detect_profile import Profile, StageTime
    from refinedet_cli.engine.detect_store import Summary
    from refinedet_cli.engine.distributed import Shard
    from refinedet_cli.engine.predict import AnyPredictor
    from refinedet_cli.engine.results import PictureRecord


class MoreOutput(StrEnum):
    """What --also takes; Typer knows no list of literals."""

    RESULTS = "results"
    YOLO = "yolo"
    CSV = "csv"


# With more pictures than this, only classes are listed; and of one picture, not more than its best detections.
_FEW_PICTURES = 20
_ROWS_OF_A_PICTURE = 12
_ROWS_OF_FAILURES = 100
_CHUNK = 2**16
# What `detect` writes below --out is not to be looked at again.
_PICTURE_FOLDERS = ("annotated", "crops")


def detect(
    sources: SourcesArg,
    out: OptionalOutOpt = None,
    no_draw: Annotated[
        bool, typer.Option("--no-draw", help="Write no annotated pictures.", rich_help_panel=OUTPUT)
    ] = False,
    crops: Annotated[
        bool, typer.Option("--crops", help="Write each object as a picture too.", rich_help_panel=OUTPUT)
    ] = False,
    also: Annotated[
        list[MoreOutput] | None,
        typer.Option(
            "--also",
            help="What to write beside detections.json: a COCO results list, YOLO labels or a table. Repeatable.",
            show_default="nothing",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that --out holds.", rich_help_panel=OUTPUT)
    ] = False,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    weights: WeightsOpt = None,
    offline: OfflineOpt = False,
    score: ScoreOpt = 0.3,
    only_classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            metavar="NAME|ID",
            help="Keep this class alone, by its name or category id. Repeatable.",
            show_default="all",
            rich_help_panel=MODEL,
        ),
    ] = None,
    multi_scale: MultiScaleOpt = None,
    tile: TileOpt = None,
    tile_overlap: TileOverlapOpt = None,
    null: Annotated[
        bool,
        typer.Option(
            "--null", "-0", help="The list on standard input is as find -print0 writes it.", rich_help_panel=DATA
        ),
    ] = False,
    device: DeviceOpt = "auto",
    precision: PrecisionOpt = None,
    batch: BatchOpt = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Tell where the time went, stage by stage.", rich_help_panel=RUNTIME)
    ] = False,
) -> None:
    """Find objects in pictures and videos.

    With --out, that folder gets detections.json (a COCO data set with scores), detections.jsonl (a line a picture,
    written as the run goes) and, in annotated, copies of the pictures with boxes drawn on them. Without it, the
    detections are only shown. A picture that cannot be read is listed and the rest goes on; the exit code is then 8.

    Where no pictures are written (no --out, or --no-draw without --crops), large JPEGs are decoded at a half, a quarter
    or an eighth of their size, never below twice the detector's input. That is faster; scores and boxes differ a
    little, and the output says so.

    A run that was stopped, in whatever way, goes on with --resume, and ends as if it had not been. Several processes
    share the work when torchrun starts them: torchrun --nproc-per-node 4 --no-python refinedet detect ...

    Videos, and cameras such as camera:0, need pip install "refinedet[video]" and a run of their own. --out then gets
    frames.jsonl (a line a frame, with its time), detections.json and an annotated video without sound. What of a
    damaged video can be decoded is worked on; the exit code is then 8. Ctrl-C ends a camera.
    """
    from refinedet_cli.engine.openmp import load_torch_for_company

    output = Output(json=json, quiet=quiet)
    _check_options(sources, out, null=null, asked={"--resume": resume, "--crops": crops, "--also": bool(also)})
    load_torch_for_company()
    if videos := videos_of(sources):
        from refinedet_cli.engine.distributed import Shard

        if shard := Shard.from_environment(os.environ):
            raise UsageError(f"this is {shard}, and a video is the work of one process", "leave torchrun out")
        asked = {"--resume": resume, "--crops": crops, "--also": bool(also), "--class": bool(only_classes)}
        _refuse_for_videos({**asked, "--profile": profile})
        local = on_disk(output, weights, offline=offline)
        found_by = _open(local, device, precision, multi_scale, (tile, tile_overlap), batch, score)
        _announce(output, found_by, score=score, draw=out is not None and not no_draw)
        detect_videos(output, found_by, videos, out, score=score, batch=batch, draw=not no_draw)
        return
    written = [out / name for name in _PICTURE_FOLDERS] if out is not None else []
    videos_passed = PassedOver()
    with _listed(sources, b"\0" if null else b"\n", written, videos_passed) as images:
        if videos_passed.count:
            output.note(
                f"passed over {counted(videos_passed.count, 'video')}: {videos_passed.cure}, in a run of their own"
            )
        if images.left_out:
            output.note(f"left out {counted(images.left_out, 'picture')} that an earlier run has written into {out}")

        from refinedet_cli.engine.detect import DetectOptions
        from refinedet_cli.engine.distributed import Shard
        from refinedet_cli.engine.predict import default_batch

        shard = Shard.from_environment(os.environ)
        if shard is not None and out is None:
            raise UsageError(f"this is {shard}, and without --out nobody could join what all find", "name a folder")
        local = on_disk(output, weights, offline=offline)
        predictor = _open(local, device, precision, multi_scale, (tile, tile_overlap), batch, score)
        options = DetectOptions(
            score=score,
            # Processes that share the work out have to agree on its blocks.
            batch=batch or default_batch(predictor.device, everywhere=shard is not None),
            draw=out is not None and not no_draw,
            crops=crops,
            formats=frozenset(chosen.value for chosen in also or ()),
            only_classes=tuple(only_classes or ()),
            resume=resume,
            shard=shard,
            profile=profile,
        )
        _announce(output, predictor, score=score, draw=options.draw)
        result = _run(output, predictor, images, out, options)
    _tell(output, result, predictor, out, images.left_out, shard)


def _open(
    weights: str | None,
    device: DeviceName,
    precision: PrecisionName | None,
    multi_scale: str | None,
    tile: tuple[int | None, float | None],
    batch: int | None,
    score: float,
) -> AnyPredictor:
    """Open the detector of a run, on the device of this process."""
    from refinedet_cli.engine.device import select_device
    from refinedet_cli.engine.distributed import own_device
    from refinedet_cli.engine.lanes import lanes_for
    from refinedet_cli.engine.open_predictor import open_predictor
    from refinedet_cli.engine.tiling import make_tiling

    place = own_device(select_device(device), os.environ)
    return open_predictor(
        weights,
        device=place,
        precision=precision,
        usual_precision="auto",
        multi_scale=multi_scale,
        tiles=make_tiling(*tile),
        batch=batch,
        lanes=lanes_for(place),
        least_score=score,
    )


def _refuse_for_videos(asked: Mapping[str, bool]) -> None:
    for option, given in asked.items():
        if given:
            raise UsageError(f"{option} is for pictures, and a video was named", f"leave {option} out")


def _check_options(sources: Sequence[str], out: Path | None, *, null: bool, asked: Mapping[str, bool]) -> None:
    if out is None and (without := [name for name, given in asked.items() if given]):
        raise UsageError(f"{without[0]} needs --out", "name a folder")
    refuse_file(out)
    if null and "-" not in sources:
        raise UsageError("--null is about the list on standard input", "give - among the sources, or leave it out")


@contextmanager
def _listed(sources: Sequence[str], end: bytes, leave_out: Sequence[Path], videos: PassedOver) -> Iterator[ImageList]:
    """List the pictures; where there are none but videos, say how to name these."""
    from refinedet_cli.data.listing import list_images

    with ExitStack() as stack:
        try:
            listing = list_images(_named(sources, end), leave_out=leave_out, on_other=videos)
            images = stack.enter_context(listing)
        except DataError as error:
            if not videos.count:
                raise
            raise DataError(error.message, videos.cure) from error
        yield images


def _named(sources: Sequence[str], end: bytes) -> Iterator[str]:
    """The sources, with ``-`` replaced by the entries of standard input, which ``end`` parts."""
    for source in sources:
        if source == "-":
            yield from _entries(end)
        else:
            yield source


def _entries(end: bytes) -> Iterator[str]:
    # The bytes themselves, for a name need not be text; tests put plain text in the place of standard input.
    stream: BinaryIO = getattr(sys.stdin, "buffer", None) or io.BytesIO(os.fsencode(sys.stdin.read()))
    rest, mark = b"", codecs.BOM_UTF8
    while chunk := stream.read(_CHUNK):
        *entries, rest = (rest + chunk.removeprefix(mark)).split(end)
        mark = b""
        yield from _paths(entries, end)
    yield from _paths([rest], end)


def _paths(entries: Sequence[bytes], end: bytes) -> Iterator[str]:
    from refinedet_cli.data.listing import Entry

    # A list that Windows wrote has lines that end in both.
    stripped = (entry.removesuffix(b"\r") if end == b"\n" else entry for entry in entries)
    return (Entry(os.fsdecode(entry)) for entry in stripped if entry.strip())


def _run(
    output: Output, predictor: AnyPredictor, images: ImageList, out: Path | None, options: DetectOptions
) -> DetectResult:
    from refinedet_cli.engine.detect import detect as run

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
                description=f"{counted(progress.objects, 'object')}{failed}",
            )

        try:
            return run(predictor, images, out=out, options=options, on_progress=show)
        except KeyboardInterrupt:
            if out is not None and reports:
                done, total = f"{reports[0].done:,}", counted(reports[0].total, "picture")
                output.note(f"{out} holds what was found so far, in {done} of {total}; --resume goes on")
            raise


def _tell(
    output: Output, result: DetectResult, predictor: AnyPredictor, out: Path | None, left_out: int, shard: Shard | None
) -> None:
    """Write the result and what is worth knowing of it."""
    from refinedet_cli.engine.device import describe_device
    from refinedet_cli.engine.multi_scale import remark_on_limits
    from refinedet_cli.engine.tiling import remark_on_tiles

    summary = result.summary
    if result.removed:
        output.note(f"removed {counted(result.removed, 'file')} that the earlier run had written into {out}")
    if result.resumed:
        output.note(f"{counted(result.resumed, 'picture')} had been done before")
    if remark := remark_on_limits(predictor, ((side, side) for side in summary.sides.elements())):
        output.note(remark)
    if remark := remark_on_tiles(predictor):
        output.note(remark)
    # Up to a thousand pictures as plain dicts: not made where nobody reads it.
    document = _document(result, predictor.classes, describe_device(predictor.device), left_out) if output.json else {}
    if shard is not None and shard.rank:
        rest = Text(f"{shard} is done; rank 0 joins what all have found")
        output.result(document | {"rank": shard.rank, "ranks": shard.count}, rest, *_profile_tables(result.profile))
        return
    output.result(document, *_tables(result, predictor.classes), *_profile_tables(result.profile))
    if out is None and summary.read > len(summary.pictures) and output.json:
        output.note(f"the first {len(summary.pictures):,} pictures are listed; with --out, a file lists all")
    if result.files:
        pictures = [
            counted(number, *words)
            for number, words in ((summary.annotated, ("annotated picture",)), (summary.crops, ("crop",)))
            if number
        ]
        output.note(f"wrote {joined([*map(str, result.files), *pictures])}")
    _judge(summary)


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


def _judge(summary: Summary) -> None:
    """Raise the error that tells scripts how much went wrong."""
    if summary.failed and not summary.read:
        raise DataError(f"no picture could be read of {summary.failed:,}", "the result lists the reasons")
    if summary.failed:
        raise PartialError(
            f"{summary.failed:,} of {counted(summary.count, 'picture')} failed", "the result lists the reasons"
        )


def _document(result: DetectResult, classes: Classes, device: str, left_out: int) -> dict[str, Any]:
    summary = result.summary
    return {
        "origin": result.origin,
        "device": device,
        "pictures": [_picture(picture, classes) for picture in summary.pictures],
        "pictures_listed": len(summary.pictures),
        "picture_count": summary.read,
        "classes": result.counts,
        "objects": result.objects,
        "failures": [{"path": p.path, "file_name": p.file_name, "reason": p.problem} for p in summary.problems],
        "failure_count": summary.failed,
        "skipped": left_out,
        "resumed": result.resumed,
        "detections_file": result.files[0] if result.files else None,
        "files": result.files,
        "seconds": round(result.seconds, 3),
        "pictures_per_second": round(result.pictures_per_second, 2),
        "profile": None if result.profile is None else _profile(result.profile),
    }


def _picture(picture: PictureRecord, classes: Classes) -> dict[str, Any]:
    names = dict(zip(classes.category_ids, classes.names, strict=True))
    return {
        "id": picture.image_id,
        "path": picture.path,
        "file_name": picture.file_name,
        "width": picture.width,
        "height": picture.height,
        "annotated": picture.annotated,
        "crops": picture.crops,
        "detections": [
            {"class": names[category_id], "category_id": category_id, "score": score, "bbox": bbox}
            for bbox, score, category_id in picture.rows
        ],
    }


def _profile(profile: Profile) -> dict[str, Any]:
    def rows(times: Sequence[StageTime]) -> list[dict[str, Any]]:
        return [
            {
                "stage": time.stage,
                "threads": time.threads,
                "seconds": round(time.seconds, 6),
                "share": round(time.share, 4),
                "ms_per_picture": round(time.ms_per_picture, 4),
            }
            for time in times
        ]

    return {
        "seconds": round(profile.seconds, 6),
        "pictures": profile.pictures,
        "in_turn": rows(profile.in_turn),
        "beside": rows(profile.beside),
        "bottleneck": profile.bottleneck.stage,
        "verdict": profile.verdict,
    }


def _tables(result: DetectResult, classes: Classes) -> list[RenderableType]:
    summary = result.summary
    tables: list[RenderableType] = []
    if 0 < summary.read <= _FEW_PICTURES:
        tables.append(_picture_table(summary.pictures, classes))
    if result.counts:
        tables.append(_class_table(result))
    if summary.failed:
        tables.append(_failure_table(summary))
    found = (
        f"{counted(result.objects, 'object')} in {summary.with_objects:,} of {counted(summary.read, 'picture')}"
        if result.objects
        else f"nothing found in {counted(summary.read, 'picture')}"
    )
    origin = result.origin
    # The decoder is its name and version, and how large it makes pictures.
    made = f"at a score of {origin.score_threshold:g} or better, {origin.precision}, {origin.decoder.split(', ')[-1]}"
    schedule = origin.multi_scale
    passes = (
        f", {counted(schedule.count, 'pass', 'passes')} a picture (multi-scale {schedule.name})" if schedule else ""
    )
    # A run that was done before has no pace.
    speed = f", {pace(result.pictures_per_second)} pictures/s" if result.worked else ""
    return [*tables, Text(f"{found} {made}{speed}{passes}")]


def _picture_table(pictures: Sequence[PictureRecord], classes: Classes) -> Table:
    names = dict(zip(classes.category_ids, classes.names, strict=True))
    table = FittedTable("Pictures", names=2)
    table.add_text("Picture", "Class")
    table.add_number("Score", "Left", "Top", "Width", "Height")
    for picture in pictures:
        # On a terminal a name stands once above its rows; in a pipe each row has to make sense alone.
        first, later = picture.file_name, "" if sys.stdout.isatty() else picture.file_name
        rows = picture.rows
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
    table = FittedTable("Classes")
    table.add_text("Class")
    table.add_number("Pictures", "Objects", "Best score")
    for count in result.counts:
        table.add_row(count.name, f"{count.pictures:,}", f"{count.objects:,}", f"{count.best_score:.2f}")
    return table


def _profile_tables(profile: Profile | None) -> list[RenderableType]:
    if profile is None:
        return []
    table = FittedTable("Where the time went")
    table.add_text("Stage")
    table.add_number("Threads", "Seconds", "Share", "ms/picture")
    for times in (profile.in_turn, profile.beside):
        for time in times:
            if time.seconds:
                numbers = (f"{time.seconds:.2f}", f"{time.share:.1%}", f"{time.ms_per_picture:.2f}")
                table.add_row(time.stage, str(time.threads), *numbers)
        table.add_section()
    return [table, Text(profile.verdict)]


def _failure_table(summary: Summary) -> Table:
    table = Table(title="Failed", title_justify="left", title_style="red")
    table.add_column("File", overflow="fold")
    table.add_column("Reason", overflow="fold")
    for picture in summary.problems[:_ROWS_OF_FAILURES]:
        table.add_row(str(picture.path), picture.problem)
    if summary.failed > _ROWS_OF_FAILURES:
        table.add_row(f"and {summary.failed - _ROWS_OF_FAILURES:,} more", "", style="dim")
    return table
