"""What `refinedet detect` does with videos and cameras."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from refinedet_cli.cli.fitted_table import FittedTable
from refinedet_cli.cli.output import Output
from refinedet_cli.core.words import counted, pace
from refinedet_cli.errors import PartialError, UsageError

if TYPE_CHECKING:
    from refinedet_cli.engine.predict import AnyPredictor
    from refinedet_cli.engine.video import VideoProgress, VideoResult


def videos_of(sources: Sequence[str]) -> list[str]:
    """Choose the videos and cameras among what was named, patterns such as ``*.mp4`` expanded.

    Raises:
        UsageError: there is something else too: each run has one kind of result.
        DataError: a pattern matches nothing.
    """
    from refinedet_cli.engine.video_files import expand_pattern, is_camera, is_video_name

    videos = [s for s in sources if is_camera(s) or (is_video_name(Path(s).name) and not os.path.isdir(s))]  # noqa: PTH112 - Path.is_dir raises for long names
    if videos and len(videos) < len(sources):
        raise UsageError(f"{videos[0]} is a video, and pictures were named too", "detect videos in a run of their own")
    return list(dict.fromkeys(path for video in videos for path in expand_pattern(video)))


class PassedOver:
    """Takes notice of videos in folders of which only the pictures are taken.

    Attributes:
        count: of the videos.
        first: of them by name; None where there is none.
    """

    def __init__(self) -> None:
        self.count = 0
        self.first: Path | None = None

    def __call__(self, path: str) -> None:
        """Look at a file that is no picture."""
        from refinedet_cli.engine.video_files import is_video_name

        file = Path(path)
        if is_video_name(file.name):
            self.count += 1
            self.first = file if self.first is None else min(self.first, file)

    @property
    def cure(self) -> str:
        """How to name them; empty where there is none."""
        if self.first is None:
            return ""
        every = self.first.with_stem("*")
        return f"of a folder only pictures are taken; name its videos: {self.first}, or {every} for all"


def detect_videos(
    output: Output,
    predictor: AnyPredictor,
    videos: Sequence[str],
    out: Path | None,
    *,
    score: float,
    batch: int | None,
    draw: bool,
) -> None:
    """Find objects in videos, one after the other, and tell the result.

    A single video goes into ``out`` itself, each of several into a folder of its name in it. One of several that cannot
    be read does not keep the others from being looked at. SIGTERM stops a run as Ctrl-C does, with what was found.

    Raises:
        UsageError: two videos would go into one folder.
        DataError: no video can be read.
        PartialError: a video is damaged, and what could be decoded was worked on; or not all could be read.
    """
    from refinedet_cli.engine.device import describe_device
    from refinedet_cli.engine.predict import default_batch
    from refinedet_cli.engine.tiling import remark_on_tiles
    from refinedet_cli.engine.video_files import UnreadableVideoError

    batch = batch or default_batch(predictor.device)
    folders = _folders(videos, out)
    results, failed = [], []
    with _stopped_by_sigterm():
        for video, folder in zip(videos, folders, strict=True):
            try:
                results.append(_detect(output, predictor, video, folder, score=score, batch=batch, draw=draw))
            except UnreadableVideoError as error:
                failed.append({"source": video, "problem": error.message})
                if len(failed) == len(videos):
                    raise
                output.warn(error.message)
    for result in results:
        if result.warning is not None and len(results) > 1:
            output.warn(result.warning)
    document = {
        "device": describe_device(predictor.device),
        "videos": [_document(result) for result in results],
        "failed": failed,
        "objects": sum(result.objects for result in results),
    }
    if remark := remark_on_tiles(predictor):
        output.note(remark)
    output.result(document, *_tables(results))
    for result in results:
        if result.results_file is not None:
            drawn = f" and {result.annotated} (without sound)" if result.annotated is not None else ""
            output.note(f"wrote {result.results_file}, {result.frames_file}{drawn}")
    _tell_of_damage(results, failed=len(failed))


def _tell_of_damage(results: Sequence[VideoResult], *, failed: int) -> None:
    damaged = [result.warning for result in results if result.warning is not None]
    if failed:
        raise PartialError(
            f"{failed} of {counted(len(results) + failed, 'video')} could not be read", "the rest was worked on"
        )
    if damaged:
        whole = damaged[0] if len(results) == 1 else f"{len(damaged)} of {len(results)} videos are damaged"
        raise PartialError(whole, "what could be decoded was worked on; copy it again for the rest")


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _folders(videos: Sequence[str], out: Path | None) -> list[Path | None]:
    if out is None or len(videos) == 1:
        return [out] * len(videos)
    names = [video.replace(":", "-") if video.startswith("camera:") else Path(video).name for video in videos]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two of the videos are called {name}", "detect them in runs of their own")
    return [out / name for name in names]


def _detect(
    output: Output, predictor: AnyPredictor, video: str, out: Path | None, *, score: float, batch: int, draw: bool
) -> VideoResult:
    from refinedet_cli.engine.video import detect_video

    with output.progress(f"Detecting {Path(video).name}") as bars:
        task = bars.add_task("", total=None)

        def show(progress: VideoProgress) -> None:
            total = None if progress.total is None else max(progress.frames, progress.total)
            bars.update(task, completed=progress.frames, total=total, description=counted(progress.objects, "object"))

        return detect_video(predictor, video, out=out, score=score, batch=batch, draw=draw, on_progress=show)


def _document(result: VideoResult) -> dict[str, Any]:
    return {
        "source": result.source,
        "name": result.name,
        "origin": result.origin,
        "width": result.width,
        "height": result.height,
        "frames": result.frames,
        "duration": round(result.duration, 3),
        "objects": result.objects,
        "classes": result.counts,
        "warning": result.warning,
        "detections_file": result.results_file,
        "frames_file": result.frames_file,
        "annotated": result.annotated,
        "encoder": result.encoder,
        "seconds": round(result.seconds, 3),
        "frames_per_second": round(result.frames_per_second, 2),
    }


def _tables(results: Sequence[VideoResult]) -> list[RenderableType]:
    table = FittedTable("Videos", names=2)
    table.add_text("Video", "Class")
    table.add_number("Frames", "Objects", "Best score")
    for result in results:
        for count in result.counts:
            row = (f"{count.pictures:,}", f"{count.objects:,}", f"{count.best_score:.2f}")
            table.add_row(result.name, count.name, *row)
        if not result.counts:
            table.add_row(result.name, "nothing", "", "", "", style="dim")
        table.add_section()
    frames, objects = sum(r.frames for r in results), sum(r.objects for r in results)
    seconds = max(sum(r.seconds for r in results), 1e-9)
    origin = results[0].origin
    found = counted(objects, "detection") if objects else "nothing found"
    line = (
        f"{found} in {counted(frames, 'frame')} ({sum(r.duration for r in results):.1f} s) at a score of "
        f"{origin.score_threshold:g} or better"
    )
    return [table, Text(f"{line}, {origin.precision}, {pace(frames / seconds)} frames/s")]
