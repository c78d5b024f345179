"""Find objects in many pictures: read ahead, compute in batches, draw behind, and never hold more than a few."""

from __future__ import annotations

import hashlib
import io
import os
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refinedet_cli.core.config import Classes
from refinedet_cli.core.structures import Detections
from refinedet_cli.data.files import write_whole
from refinedet_cli.data.images import FoundImage, read_image
from refinedet_cli.engine.draw import draw_detections
from refinedet_cli.engine.predict import AnyPredictor
from refinedet_cli.engine.results import (
    RESULTS_NAME,
    ClassCount,
    Failure,
    Origin,
    PictureResult,
    count_classes,
    origin_of,
    write_results,
)
from refinedet_cli.errors import DataError, RefineDetError, UsageError

ANNOTATED_NAME = "annotated"

# Decoded pictures that may wait for the network, and drawn ones that may wait for the disk, each.
_HELD_BYTES = 256 * 2**20
_JPEG_QUALITY = 92
_JPEG_LONGEST_SIDE = 65_500
# File systems take 255 bytes; this leaves room for an extension.
_LONGEST_NAME = 240

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Progress:
    """How far the work has come.

    Attributes:
        done: pictures that are finished, failed ones included.
        total: pictures there are.
        failed: of those done.
        objects: found so far.
        name: of the picture finished last.
    """

    done: int
    total: int
    failed: int
    objects: int
    name: str


@dataclass(frozen=True)
class DetectedPicture:
    """One picture that was worked on.

    Attributes:
        path: the file it came from.
        result: what was found.
        annotated: the drawn copy; None where none was asked for or it could not be written.
    """

    path: Path
    result: PictureResult
    annotated: Path | None


@dataclass(frozen=True)
class DetectResult:
    """What a whole run found.

    Attributes:
        pictures: in the order given, without those that could not be read.
        counts: per class, the most frequent first.
        failures: in the order in which they came up.
        skipped: pictures left out because they are annotated copies in the output folder.
        origin: how the detections were made.
        results_file: `detections.json`; None where nothing was to be written.
        seconds: from the first picture to the last file.
    """

    pictures: tuple[DetectedPicture, ...]
    counts: tuple[ClassCount, ...]
    failures: tuple[Failure, ...]
    skipped: int
    origin: Origin
    results_file: Path | None
    seconds: float

    @property
    def objects(self) -> int:
        """Number of detections in all pictures."""
        return sum(count.objects for count in self.counts)

    @property
    def pictures_per_second(self) -> float:
        """Pictures worked on in a second, reading, drawing and writing included."""
        return len(self.pictures) / max(self.seconds, 1e-9)


def ignore(progress: Progress) -> None:
    """Take no notice of progress."""


def detect(
    predictor: AnyPredictor,
    images: Sequence[FoundImage],
    *,
    out: Path | None,
    score: float,
    batch: int,
    draw: bool = True,
    readers: int | None = None,
    on_progress: Callable[[Progress], None] = ignore,
) -> DetectResult:
    """Find objects in pictures, and write what was found.

    A picture that cannot be read or written becomes a `Failure`, and the rest goes on. When the run is stopped, by an
    interrupt or an error, what was found so far is written before it ends, marked as incomplete.

    Args:
        predictor: the detector.
        images: with unique names; image ids are their places in this list, counted from 1.
        out: folder for `detections.json` and ``annotated/``, made where missing; None writes nothing.
        score: detections that score lower are left out.
        batch: pictures computed together; fewer where they are large.
        draw: write annotated pictures, under the names of the pictures. PNG stays PNG, all else becomes JPEG.
        readers: threads that decode; None fits the machine.
        on_progress: called in this thread after each picture.

    Returns:
        `DetectResult`; pictures and failures of reading together are all images that were not skipped.

    Raises:
        UsageError: ``out`` is a file, or cannot be a folder.
        DataError: only annotated copies of an earlier run were given, or `detections.json` cannot be written.
    """
    start = time.perf_counter()
    numbered = list(enumerate(images, start=1))
    if out is not None:
        _make_folder(out)
        numbered = [(i, image) for i, image in numbered if not _inside(image.path, out / ANNOTATED_NAME)]
        if images and not numbered:
            raise DataError(
                f"{out / ANNOTATED_NAME} holds annotated copies, and no other pictures were given",
                "name the original pictures, or choose another output folder",
            )
    origin = origin_of(predictor, score_threshold=score)
    annotated = out / ANNOTATED_NAME if out is not None and draw else None
    results_file = out / RESULTS_NAME if out is not None else None
    run = _Run(predictor, score, numbered, annotated, on_progress)
    readers = readers or min(4, os.cpu_count() or 1)
    try:
        with ThreadPoolExecutor(readers) as pool, closing(_groups(numbered, batch, readers, run.fail)) as groups:
            for group in groups:
                run.work(group, pool)
            run.settle(held_bytes=0)
    except BaseException:
        # The pool has finished what it had begun.
        run.settle(held_bytes=0)
        if results_file is not None and run.pictures:
            run.write(results_file, origin, complete=False)
        raise
    if results_file is not None:
        run.write(results_file, origin, complete=True)
    return DetectResult(
        pictures=tuple(run.pictures),
        counts=count_classes((picture.result for picture in run.pictures), predictor.classes),
        failures=tuple(run.failures),
        skipped=len(images) - len(numbered),
        origin=origin,
        results_file=results_file,
        seconds=time.perf_counter() - start,
    )


def annotated_paths(folder: Path, images: Sequence[FoundImage]) -> list[Path]:
    """Name the annotated copies of pictures.

    Args:
        folder: under which they go.
        images: pictures with unique relative names.

    Returns:
        one path per picture, each in the sub-folder that its name has, none equal to another (case aside). A JPEG or
        PNG keeps its name, ``a.webp`` becomes ``a.webp.jpg``, and a name too long for a file is cut and marked with its
        hash.
    """
    taken: set[str] = set()
    paths = []
    for image in images:
        parts = [_short(part) for part in PurePosixPath(image.name).parts if part not in ("/", "..")]
        name = PurePosixPath(*parts)
        if name.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            name = name.with_name(name.name + ".jpg")
        unique, number = name, 1
        while _folded(unique) in taken:
            number += 1
            unique = name.with_stem(f"{name.stem}-{number}")
        taken.add(_folded(unique))
        paths.append(folder / unique)
    return paths


def _folded(name: PurePosixPath) -> str:
    """The name as file systems compare it that do not tell cases or Unicode forms apart."""
    return unicodedata.normalize("NFC", str(name)).casefold()


def _short(part: str) -> str:
    raw = os.fsencode(part)
    if len(raw) <= _LONGEST_NAME:
        return part
    suffix = PurePosixPath(part).suffix
    suffix = suffix if len(os.fsencode(suffix)) <= 10 else ""
    mark = f"~{hashlib.sha256(raw).hexdigest()[:8]}"
    kept = raw[: _LONGEST_NAME - len(mark) - len(suffix)]
    # A cut through the bytes of one letter would leave something that is no text.
    return kept.decode("utf-8", errors="ignore") + mark + suffix


class _Decoded(NamedTuple):
    """A picture that waits for the network."""

    image_id: int
    image: FoundImage
    pixels: Pixels


class _Writing(NamedTuple):
    """An annotated copy under way: whose, how large its pixels are, and the file once it is there."""

    place: int
    size: int
    file: Future[Path]


class _Run:
    """What a run has found so far, and its files under way."""

    def __init__(
        self,
        predictor: AnyPredictor,
        score: float,
        images: Sequence[tuple[int, FoundImage]],
        annotated: Path | None,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.pictures: list[DetectedPicture] = []
        self.failures: list[Failure] = []
        self._predictor = predictor
        self._score = score
        self._annotated = annotated
        self._targets: dict[int, Path] = {}
        if annotated is not None:
            paths = annotated_paths(annotated, [image for _, image in images])
            self._targets = {image_id: path for (image_id, _), path in zip(images, paths, strict=True)}
        self._on_progress = on_progress
        self._total = len(images)
        self._unread = 0
        self._objects = 0
        self._writing: deque[_Writing] = deque()

    def fail(self, image: FoundImage, error: RefineDetError) -> None:
        """Record a picture that could not be read."""
        self._unread += 1
        self._record(image.path, image.name, error)
        self._report(image.name)

    def work(self, group: Sequence[_Decoded], pool: ThreadPoolExecutor) -> None:
        """Find the objects in a group of pictures and hand the drawing to the pool."""
        found = self._predictor.predict([picture.pixels for picture in group])
        for (image_id, image, pixels), everything in zip(group, found, strict=True):
            detections = everything.above(self._score)
            height, width = pixels.shape[:2]
            result = PictureResult(image_id, image.name, width, height, detections)
            self.pictures.append(DetectedPicture(image.path, result, annotated=None))
            self._objects += len(detections)
            if self._annotated is not None:
                self.settle(held_bytes=_HELD_BYTES - pixels.nbytes)
                file = pool.submit(
                    _write_annotated,
                    self._targets[image_id],
                    self._annotated,
                    pixels,
                    detections,
                    self._predictor.classes,
                )
                self._writing.append(_Writing(len(self.pictures) - 1, pixels.nbytes, file))
            self._report(image.name)

    def settle(self, *, held_bytes: int) -> None:
        """Wait for annotated copies until those under way hold no more than so many bytes of pixels."""
        while self._writing and (held_bytes <= 0 or sum(w.size for w in self._writing) > held_bytes):
            place, _, file = self._writing.popleft()
            picture = self.pictures[place]
            try:
                self.pictures[place] = replace(picture, annotated=file.result())
            except DataError as error:
                self._record(picture.path, picture.result.file_name, error)

    def write(self, path: Path, origin: Origin, *, complete: bool) -> None:
        """Write `detections.json`."""
        found = [picture.result for picture in self.pictures]
        write_results(path, found, self._predictor.classes, origin, failures=self.failures, complete=complete)

    def _record(self, path: Path, name: str, error: RefineDetError) -> None:
        reason = error.message.removeprefix(f"{path} ")
        self.failures.append(Failure(path, name, f"{reason}; {error.hint}" if error.hint else reason))

    def _report(self, name: str) -> None:
        done = len(self.pictures) + self._unread
        self._on_progress(Progress(done, self._total, len(self.failures), self._objects, name))


def _groups(
    images: Sequence[tuple[int, FoundImage]],
    batch: int,
    readers: int,
    on_failure: Callable[[FoundImage, RefineDetError], None],
) -> Generator[list[_Decoded]]:
    """Read pictures ahead and gather them, in order, into groups of ``batch``; large pictures make smaller groups."""
    group: list[_Decoded] = []
    held = 0
    pool = ThreadPoolExecutor(readers)
    try:
        for image_id, image, pixels in _read_ahead(images, batch, readers, pool):
            if isinstance(pixels, RefineDetError):
                on_failure(image, pixels)
                continue
            group.append(_Decoded(image_id, image, pixels))
            held += pixels.nbytes
            if len(group) == batch or held >= _HELD_BYTES:
                yield group
                group, held = [], 0
        if group:
            yield group
    finally:
        pool.shutdown(cancel_futures=True)


def _read_ahead(
    images: Sequence[tuple[int, FoundImage]], batch: int, readers: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, FoundImage, Pixels | RefineDetError]]:
    upcoming = iter(images)
    pending: deque[tuple[int, FoundImage, Future[Pixels | RefineDetError]]] = deque()
    largest = 0
    while True:
        # How large pictures are is known when the first are there; until then only a few are read.
        ahead = max(readers, min(batch + readers, _HELD_BYTES // largest)) if largest else readers
        for image_id, image in islice(upcoming, max(0, ahead - len(pending))):
            pending.append((image_id, image, pool.submit(_read, image.path)))
        if not pending:
            return
        image_id, image, future = pending.popleft()
        pixels = future.result()
        if not isinstance(pixels, RefineDetError):
            largest = max(largest, pixels.nbytes)
        yield image_id, image, pixels


def _read(path: Path) -> Pixels | RefineDetError:
    """Decode a picture; what is wrong with it is handed back, for one bad file must not stop the others."""
    try:
        return read_image(path)
    except DataError as error:
        return error


def _write_annotated(target: Path, folder: Path, pixels: Pixels, detections: Detections, classes: Classes) -> Path:
    if not _inside(target, folder):
        raise DataError(f"not drawn: {target} is a link that leads out of {folder}", "remove the link")
    picture = draw_detections(pixels, detections, classes)
    if target.suffix.lower() != ".png" and max(picture.size) > _JPEG_LONGEST_SIDE:
        target = target.with_name(f"{target.name}.png")
    encoded = io.BytesIO()
    if target.suffix.lower() == ".png":
        picture.save(encoded, "PNG", compress_level=4)
    else:
        # Full colour resolution: lines of one pixel would lose their colour otherwise.
        picture.save(encoded, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    write_whole(target, encoded.getvalue())
    return target


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _make_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, and the output goes into a folder", "name a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError):
        raise UsageError(f"{path} cannot be made: a part of it is a file", "name another folder") from None
    except OSError as error:
        raise DataError(f"{path} cannot be made: {error.strerror}", "name another folder") from error
