"""Find objects in a video: frames decoded as they are needed, found in batches, drawn into a video of the same times.

However long the video is, memory holds a few batches of frames and one count per class. What is found goes to a file of
JSON lines as it comes; the COCO data set is made of that file in the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from refinedet_cli.core.config import Classes
from refinedet_cli.core.structures import Detections
from refinedet_cli.engine.draw import draw_detections
from refinedet_cli.engine.predict import AnyPredictor
from refinedet_cli.engine.results import (
    RESULTS_NAME,
    ClassCount,
    ClassTally,
    Origin,
    PictureRecord,
    Row,
    detection_rows,
    origin_of,
    row_document,
    write_records,
)
from refinedet_cli.engine.video_files import Frame, UnreadableVideoError, VideoReader, VideoWriter, decoder_name
from refinedet_cli.errors import UsageError
from refinedet_cli.files import whole_file

FRAMES_NAME = "frames.jsonl"
ANNOTATED_NAME = "annotated"

# Decoded frames that are computed together hold no more than this.
_HELD_BYTES = 256 * 2**20
_TIME_DECIMALS = 6


@dataclass(frozen=True)
class VideoProgress:
    """How far the work has come.

    Attributes:
        frames: that are done.
        total: frames there are, perhaps an estimate; None where nothing is known, as of a camera.
        objects: found so far.
    """

    frames: int
    total: int | None
    objects: int


@dataclass(frozen=True)
class VideoResult:
    """What was found in a video.

    Attributes:
        source: what was named.
        name: what it is called in `detections.json`: frame 12 of a.mp4 is ``a.mp4#000012``.
        width, height: of the first frame as it is seen, px-img.
        frames: that were decoded.
        duration: when the last frame ends, in seconds of the video.
        counts: per class, the most frequent first; ``pictures`` are frames.
        warning: what is wrong with the file, in one line; None where all of it could be decoded.
        origin: how the detections were made.
        results_file, frames_file: `detections.json` and `frames.jsonl`; None where nothing was to be written.
        annotated: the drawn video, without sound; None where none was asked for.
        encoder: what encoded it.
        seconds: that the work took.
    """

    source: str
    name: str
    width: int
    height: int
    frames: int
    duration: float
    counts: tuple[ClassCount, ...]
    warning: str | None
    origin: Origin
    results_file: Path | None
    frames_file: Path | None
    annotated: Path | None
    encoder: str | None
    seconds: float

    @property
    def objects(self) -> int:
        """Number of detections in all frames."""
        return sum(count.objects for count in self.counts)

    @property
    def frames_per_second(self) -> float:
        """Frames worked on in a second, decoding, drawing and encoding included."""
        return self.frames / max(self.seconds, 1e-9)


def ignore(progress: VideoProgress) -> None:
    """Take no notice of progress."""


def detect_video(
    predictor: AnyPredictor,
    source: str,
    *,
    out: Path | None,
    score: float,
    batch: int,
    draw: bool = True,
    on_progress: Callable[[VideoProgress], None] = ignore,
) -> VideoResult:
    """Find objects in each frame of a video, and write what was found.

    What of a damaged file can be decoded is worked on; the result's warning tells of the rest. When the run is stopped,
    by an interrupt or an error, what was found so far is written before it ends, marked as incomplete. An interrupt is
    how one stops a camera: it then ends as if the video were over.

    Args:
        predictor: the detector.
        source: a path, or a camera such as ``camera:0``.
        out: folder for `detections.json`, `frames.jsonl` (a line for each frame with its number from 0, its time in
            seconds and its detections) and ``annotated/``; None writes nothing.
        score: detections that score lower are left out.
        batch: frames computed together; fewer where they are large.
        draw: write a video with boxes drawn on it, with the times of the frames as they are, and without sound.
        on_progress: called in this thread after each batch.

    Returns:
        `VideoResult`.

    Raises:
        UsageError: PyAV is not installed, or the camera is not named as it must be.
        DataError: there is no such file or camera, no frame of it can be decoded, or a file cannot be written.
    """
    start = time.perf_counter()
    origin = replace(origin_of(predictor, score_threshold=score), decoder=decoder_name())
    stopped: BaseException | None = None
    with VideoReader(source) as reader:
        with ExitStack() as files:
            run = _Run(predictor, reader, score, out, draw, files)
            try:
                # Within the others, so that a drawn video that cannot be written goes alone.
                with ExitStack() as drawing:
                    try:
                        for frames in _groups(reader.frames(), batch):
                            run.work(frames, drawing)
                            on_progress(VideoProgress(run.frames, reader.facts.frames, run.objects))
                    except BaseException as error:
                        if not run.frames or run.drawing_failed:
                            raise
                        stopped = error
                    run.settle()
            except BaseException as error:
                if not run.frames:
                    raise
                stopped = stopped or error
            if not run.frames:
                raise UnreadableVideoError(f"no frame of {source} could be decoded", "copy it again")
        ended = stopped is None or (reader.live and isinstance(stopped, KeyboardInterrupt))
        result = run.result(origin, warning=reader.trouble() if stopped is None else None)
    if out is not None:
        records = _Frames(result, out / FRAMES_NAME)
        write_records(out / RESULTS_NAME, records, predictor.classes, origin, complete=ended)
    if stopped is not None and not ended:
        raise stopped
    return replace(result, seconds=time.perf_counter() - start)


class _Run:
    """What was found so far, and the files under way: that of the frames is closed with ``files``."""

    def __init__(
        self,
        predictor: AnyPredictor,
        reader: VideoReader,
        score: float,
        out: Path | None,
        draw: bool,
        files: ExitStack,
    ) -> None:
        self.frames = 0
        self.objects = 0
        self.drawing_failed = False
        self._predictor = predictor
        self._reader = reader
        self._score = score
        self._out = out
        self._size = (0, 0)
        self._tally = ClassTally(predictor.classes)
        self._lines: BinaryIO | None = None
        self._annotated: Path | None = None
        self._writer: VideoWriter | None = None
        self._drawing: Future[None] | None = None
        self._names = dict(zip(predictor.classes.category_ids, predictor.classes.names, strict=True))
        if out is None:
            return
        self._lines = files.enter_context(whole_file(out / FRAMES_NAME))
        if draw:
            name = reader.name if Path(reader.name).suffix.lower() == ".mp4" else f"{reader.name}.mp4"
            self._annotated = out / ANNOTATED_NAME / name
            if not reader.live and self._annotated.resolve() == Path(reader.source).resolve():
                raise UsageError(f"{reader.source} would be replaced by its annotated copy", "choose another --out")

    def work(self, frames: Sequence[Frame], drawing: ExitStack) -> None:
        """Find the objects of some frames, and hand the drawing over; the drawn video is closed with ``drawing``."""
        found = [f.above(self._score) for f in self._predictor.predict([frame.pixels for frame in frames])]
        if not self.frames:
            self._begin(frames[0], drawing)
        for frame, detections in zip(frames, found, strict=True):
            rows = detection_rows(detections, self._predictor.classes)
            self.frames += 1
            self.objects += len(rows)
            self._tally.add(rows)
            if self._lines is not None:
                self._lines.write(self._line(frame, rows))
        if self._writer is not None:
            self.settle()
            self._drawing = self._pool.submit(_draw, self._writer, frames, found, self._predictor.classes)

    def settle(self) -> None:
        """Wait for the drawing under way."""
        if self._drawing is None:
            return
        try:
            self._drawing.result()
        except Exception:
            self.drawing_failed = True
            raise

    def result(self, origin: Origin, *, warning: str | None) -> VideoResult:
        """Say what was found; the time it took is not known yet."""
        return VideoResult(
            source=self._reader.source,
            name=self._reader.name,
            width=self._size[1],
            height=self._size[0],
            frames=self.frames,
            duration=self._reader.end,
            counts=self._tally.counts(),
            warning=warning,
            origin=origin,
            results_file=None if self._out is None else self._out / RESULTS_NAME,
            frames_file=None if self._out is None else self._out / FRAMES_NAME,
            annotated=self._annotated,
            encoder=None if self._writer is None else self._writer.encoder,
            seconds=0.0,
        )

    def _begin(self, frame: Frame, drawing: ExitStack) -> None:
        self._size = frame.pixels.shape[:2]
        if self._annotated is not None:
            file = drawing.enter_context(whole_file(self._annotated))
            self._writer = drawing.enter_context(VideoWriter(file, self._reader.facts, self._size))
            # Closed first, so that nothing is drawn into a closed file.
            self._pool = drawing.enter_context(ThreadPoolExecutor(1))

    def _line(self, frame: Frame, rows: Sequence[Row]) -> bytes:
        height, width = frame.pixels.shape[:2]
        line = {
            "frame": frame.number,
            "time": round(float(frame.time), _TIME_DECIMALS),
            "width": width,
            "height": height,
            "detections": [{"class": self._names[row.category_id], **row_document(row)} for row in rows],
        }
        return json.dumps(line, allow_nan=False).encode() + b"\n"


def _groups(frames: Iterator[Frame], batch: int) -> Iterator[list[Frame]]:
    """Gather frames into groups of ``batch``; large frames make smaller groups."""
    group: list[Frame] = []
    for frame in frames:
        group.append(frame)
        if len(group) == batch or len(group) * frame.pixels.nbytes >= _HELD_BYTES:
            yield group
            group = []
    if group:
        yield group


def _draw(writer: VideoWriter, frames: Sequence[Frame], found: Sequence[Detections], classes: Classes) -> None:
    for frame, detections in zip(frames, found, strict=True):
        writer.write(np.asarray(draw_detections(frame.pixels, detections, classes)), frame.time)


def frame_name(video: str, number: int) -> str:
    """Name a frame in a COCO data set, as in ``a.mp4#000012``."""
    return f"{video}#{number:06d}"


class _Frames:
    """The frames of a file of JSON lines as often as they are asked for, and last what is wrong with the video."""

    def __init__(self, result: VideoResult, file: Path) -> None:
        self._result = result
        self._file = file

    def __iter__(self) -> Iterator[PictureRecord]:
        path, name = Path(self._result.source), self._result.name
        number = -1
        with self._file.open("rb") as lines:
            for text in lines:
                line = json.loads(text)
                number = line["frame"]
                rows = tuple(Row(entry["bbox"], entry["score"], entry["category_id"]) for entry in line["detections"])
                yield PictureRecord(number, path, frame_name(name, number), line["width"], line["height"], rows)
        if self._result.warning is not None:
            yield PictureRecord(number + 1, path, name, 0, 0, problem=self._result.warning)
