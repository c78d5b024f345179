"""Find objects in many pictures: read ahead, compute in batches, draw behind, and never hold more than a few."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from refinedet_cli.core.structures import Detections
from refinedet_cli.data.files import make_folder
from refinedet_cli.data.images import FoundImage, Reading
from refinedet_cli.engine import detect_reading
from refinedet_cli.engine.cores import usable_cores
from refinedet_cli.engine.detect_classes import select_labels
from refinedet_cli.engine.detect_copies import ANNOTATED_NAME, CROPS_NAME, Copies, Targets, reason_of
from refinedet_cli.engine.detect_journal import RunKey
from refinedet_cli.engine.detect_names import UniqueNames
from refinedet_cli.engine.detect_outputs import FORMATS
from refinedet_cli.engine.detect_profile import Profile, make_clock, profile_of
from refinedet_cli.engine.detect_reading import Decoded, Listed, blocks, read_groups
from refinedet_cli.engine.detect_shards import is_own
from refinedet_cli.engine.detect_store import InMemory, OnDisk, Store, Summary
from refinedet_cli.engine.distributed import Shard
from refinedet_cli.engine.predict import AnyPredictor
from refinedet_cli.engine.results import ClassCount, Origin, PictureRecord, detection_rows, origin_of
from refinedet_cli.engine.stages import measured_by, no_clock, stage
from refinedet_cli.errors import DataError
from refinedet_cli.files import claimed


class Images(Protocol):
    """Pictures to work on, with unique names: a list, or an `ImageList`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[FoundImage]: ...


@dataclass(frozen=True, kw_only=True)
class DetectOptions:
    """What a run keeps and writes.

    Attributes:
        score: detections that score lower are left out.
        batch: pictures computed together; fewer where they are large.
        draw: write annotated pictures, under the names of the pictures. PNG stays PNG, all else becomes JPEG.
        crops: write each object as a picture.
        formats: of `FORMATS`, to write beside `detections.json`.
        only_classes: names or category ids of the classes that are kept; empty keeps all.
        resume: go on with the run that the output folder holds; pictures that have failed are tried again.
        shard: the part of this process where several share the work; each takes whole blocks of ``batch`` pictures.
        readers: threads that decode, and as many that draw; None fits the machine.
        profile: measure where the time goes.
    """

    score: float
    batch: int
    draw: bool = True
    crops: bool = False
    formats: frozenset[str] = frozenset()
    only_classes: tuple[str, ...] = ()
    resume: bool = False
    shard: Shard | None = None
    readers: int | None = None
    profile: bool = False

    def __post_init__(self) -> None:
        if unknown := self.formats - set(FORMATS):
            raise ValueError(f"formats {sorted(unknown)} are not among {FORMATS}")

    @property
    def outputs(self) -> frozenset[str]:
        """The formats, and the kinds of pictures, that are written into a folder."""
        pictures = {name for name, wanted in ((ANNOTATED_NAME, self.draw), (CROPS_NAME, self.crops)) if wanted}
        return frozenset({"coco", *self.formats, *pictures})


@dataclass(frozen=True)
class Progress:
    """How far the work has come.

    Attributes:
        done: pictures that are finished, failed ones included, and those of the run that is gone on with.
        total: pictures there are for this process.
        failed: of those done now.
        objects: found now.
        name: of the picture finished last.
    """

    done: int
    total: int
    failed: int
    objects: int
    name: str


@dataclass(frozen=True)
class DetectResult:
    """What a whole run found.

    Attributes:
        summary: the numbers, and the first pictures.
        counts: per class, the most frequent first.
        origin: how the detections were made.
        files: what was written beside pictures, `detections.json` first; empty where nothing was to be written.
        removed: files of an earlier run that were removed.
        worked: pictures read, or tried to, by this call.
        resumed: pictures that were there already.
        seconds: from the first picture to the last file.
        profile: where the time went; None where nobody asked.
    """

    summary: Summary
    counts: tuple[ClassCount, ...]
    origin: Origin
    files: tuple[Path, ...]
    removed: int
    worked: int
    resumed: int
    seconds: float
    profile: Profile | None = None

    @property
    def pictures(self) -> Sequence[PictureRecord]:
        """The first pictures, in the order given, without those that could not be read."""
        return self.summary.pictures

    @property
    def objects(self) -> int:
        """Number of detections in all pictures."""
        return sum(count.objects for count in self.counts)

    @property
    def pictures_per_second(self) -> float:
        """Pictures worked on in a second, reading, drawing and writing included."""
        return self.worked / max(self.seconds, 1e-9)


def ignore(progress: Progress) -> None:
    """Take no notice of progress."""


def detect(
    predictor: AnyPredictor,
    images: Images,
    *,
    out: Path | None,
    options: DetectOptions,
    on_progress: Callable[[Progress], None] = ignore,
) -> DetectResult:
    """Find objects in pictures, and write what was found.

    A picture that cannot be read or written is recorded with its problem, and the rest goes on. Each picture is in
    ``detections.jsonl`` as soon as it is done; from these lines the other files are made at the end, and a run that was
    stopped, in whatever way, goes on, and tries again what has failed. After an interrupt or an error,
    `detections.json` holds what was found so far, marked as incomplete.

    Where no pictures are written, and the detector resizes each as a whole, large JPEGs are decoded reduced, as
    `read_reduced` does, which the origin records. Boxes and sizes are those of the whole picture.

    Args:
        predictor: the detector.
        images: image ids are their places, counted from 1.
        out: folder for all that is written, made where missing; None writes nothing.
        options: what is kept and written.
        on_progress: called in this thread after each picture.

    Returns:
        `DetectResult`. Of several processes rank 0 waits for the others and sums up all; the others sum up what they
        know of.

    Raises:
        UsageError: ``out`` is a file, or cannot be a folder; it holds an unfinished run, or, to resume, one of other
            pictures, another detector or other options, or files that no run has written; another process writes there;
            a class is not known.
        DataError: an output cannot be written, or the disk takes no more pictures.
        PartialError: from another process nothing came for long.
    """
    clock = make_clock(predictor.device) if options.profile else None
    with measured_by(clock or no_clock):
        result = _detect(predictor, images, out, options, on_progress)
    if clock is None:
        return result
    profile = profile_of(
        clock,
        seconds=result.seconds,
        pictures=result.worked,
        threads=_threads(options, predictor),
        could_reduce=predictor.input_size is not None and _writes_pictures(out, options),
    )
    return replace(result, profile=profile)


def _detect(
    predictor: AnyPredictor,
    images: Images,
    out: Path | None,
    options: DetectOptions,
    on_progress: Callable[[Progress], None],
) -> DetectResult:
    start = time.perf_counter()
    classes = predictor.classes
    labels = select_labels(classes, options.only_classes) if options.only_classes else None
    kept = None if labels is None else tuple(classes.names[label - 1] for label in sorted(labels))
    copies = Copies(out, classes, annotated=options.draw, crops=options.crops) if out is not None else None
    # What is drawn on, or cut, is needed in full.
    input_size = None if _writes_pictures(out, options) else predictor.input_size
    origin = origin_of(predictor, score_threshold=options.score, only_classes=kept, reduced=input_size is not None)
    with _claim(out, options.shard), _open_store(predictor, images, out, origin, options) as store:
        resumed = store.done
        done, wanted = _count(len(images), options, store)
        run = _Run(
            predictor,
            choose=lambda found: _of_labels(found.above(options.score), labels),
            copies=copies,
            store=store,
            on_progress=on_progress,
            done=done,
            total=done + wanted,
        )
        try:
            _go_through(run, images, options, store, threads=_threads(options, predictor), input_size=input_size)
        except BaseException:
            # What ended the run is told, not what a disk that is full says next.
            with suppress(DataError):
                # The pool has finished what it had begun.
                run.settle(held_bytes=0)
            with suppress(DataError):
                store.stop()
            raise
        with stage("outputs"):
            files, summary = store.finish(), store.summary()
        removed = store.removed
    return DetectResult(
        summary=summary,
        counts=summary.classes.counts(),
        origin=origin,
        files=tuple(files),
        removed=removed,
        worked=run.worked,
        resumed=resumed,
        seconds=time.perf_counter() - start,
    )


def _writes_pictures(out: Path | None, options: DetectOptions) -> bool:
    return out is not None and (options.draw or options.crops)


def _claim(out: Path | None, shard: Shard | None) -> AbstractContextManager[None]:
    """Keep other runs from the folder, which is made where missing; processes of one run have a file each."""
    if out is None:
        return nullcontext()
    make_folder(out)
    return claimed(out, f".lock-{shard.rank}" if shard is not None and shard.rank else ".lock")


def _open_store(
    predictor: AnyPredictor, images: Images, out: Path | None, origin: Origin, options: DetectOptions
) -> Store:
    if out is None:
        return InMemory(predictor.classes, options.shard, options.batch)
    key = RunKey.of(origin, predictor.config, images, annotated=options.draw, crops=options.crops)
    return OnDisk(
        out,
        key,
        predictor.classes,
        outputs=options.outputs,
        drawn=(image.name for image in images) if options.draw else (),
        resume=options.resume,
        shard=options.shard,
        batch=options.batch,
    )


def _threads(options: DetectOptions, predictor: AnyPredictor) -> int:
    """Threads that decode, and as many that draw; a network on a GPU is faster, and leaves the processor to them."""
    most = 4 if predictor.device.type == "cpu" else 8
    return options.readers or min(most, usable_cores())


def _go_through(
    run: _Run, images: Images, options: DetectOptions, store: Store, *, threads: int, input_size: tuple[int, int] | None
) -> None:
    """Work on all pictures that the store wants of this process; ``input_size`` as for `read_groups`."""

    def wanted(_: int, image_ids: Sequence[int]) -> bool:
        return any(map(store.wants, image_ids))

    with UniqueNames() as annotated, UniqueNames() as stems, ThreadPoolExecutor(threads) as pool:
        # All names are given, also those of pictures that are not wanted, so that they are the same in every process.
        numbered = ((i, image, run.targets(image, annotated, stems)) for i, image in enumerate(images, start=1))
        listed = blocks(numbered, options.batch, wanted)
        with closing(read_groups(listed, options.batch, threads, input_size=input_size)) as groups:
            for group in groups:
                run.work(group, pool)
        run.settle(held_bytes=0)


def _count(total: int, options: DetectOptions, store: Store) -> tuple[int, int]:
    """Count this process's pictures: those that are done, and those it has to work on."""
    done = wanted = 0
    for image_id in range(1, total + 1):
        if store.wants(image_id):
            wanted += 1
        else:
            done += is_own(image_id, options.shard, options.batch)
    return done, wanted


class _Pending(NamedTuple):
    """A record that waits for its pictures, how large their pixels are, and the record once they are written."""

    record: PictureRecord
    size: int
    written: Future[PictureRecord] | None


class _Run:
    """The work on groups of pictures, and their files under way."""

    def __init__(
        self,
        predictor: AnyPredictor,
        *,
        choose: Callable[[Detections], Detections],
        copies: Copies | None,
        store: Store,
        on_progress: Callable[[Progress], None],
        done: int,
        total: int,
    ) -> None:
        self.worked = 0
        self._predictor, self._choose, self._copies, self._store = predictor, choose, copies, store
        self._on_progress, self._done, self._total = on_progress, done, total
        self._failed = self._objects = 0
        self._pending: deque[_Pending] = deque()

    def targets(self, image: FoundImage, annotated: UniqueNames, stems: UniqueNames) -> Targets:
        """Name the files of a picture; asked once for each, in order."""
        return Targets(None, None) if self._copies is None else self._copies.targets(image.name, annotated, stems)

    def work(self, group: Sequence[Decoded], pool: ThreadPoolExecutor) -> None:
        """Find the objects in a group of pictures, all of which count, and record those that the store wants."""
        if not any(self._store.wants(decoded.listed.image_id) for decoded in group):
            return
        pictures = [reading.pixels for _, reading in group if isinstance(reading, Reading)]
        # What the predictor itself tells apart interrupts this stage.
        with stage("network"):
            found = iter(self._predictor.predict(pictures) if pictures else [])
        self._store.begin()
        for listed, reading in group:
            is_wanted = self._store.wants(listed.image_id)
            if isinstance(reading, DataError):
                if is_wanted:
                    self._fail(listed, reading)
            else:
                detections = self._choose(next(found))
                if is_wanted:
                    self._take(listed, reading, detections, pool)
            if is_wanted:
                self._report(listed.image.name)

    def settle(self, *, held_bytes: int) -> None:
        """Store records, in order, until the pictures under way hold no more than so many bytes of pixels."""
        while self._pending:
            first = self._pending[0]
            under_way = first.written is not None and not first.written.done()
            if under_way and sum(pending.size for pending in self._pending) <= held_bytes:
                return
            self._pending.popleft()
            record = first.record
            if first.written is not None:
                with stage("wait for drawing"):
                    record = first.written.result()
            self._failed += record.problem is not None and first.record.problem is None
            with stage("record"):
                self._store.append(record)

    def _fail(self, listed: Listed, error: DataError) -> None:
        path, name = listed.image.path, listed.image.name
        # A folder is in the list only if it could not be searched.
        is_folder = os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises where a folder above may not be entered
        reason = "is a folder that cannot be read; change its permissions" if is_folder else reason_of(error, path)
        record = PictureRecord(listed.image_id, path, name, 0, 0, problem=reason)
        self._failed += 1
        self._pending.append(_Pending(record, 0, None))
        self.settle(held_bytes=detect_reading.HELD_BYTES)

    def _take(self, listed: Listed, reading: Reading, detections: Detections, pool: ThreadPoolExecutor) -> None:
        (height, width), pixels = reading.size, reading.pixels
        with stage("record"):
            rows = tuple(detection_rows(_in_whole(detections, reading), self._predictor.classes))
            record = PictureRecord(listed.image_id, listed.image.path, listed.image.name, width, height, rows)
        self._objects += len(rows)
        self.settle(held_bytes=detect_reading.HELD_BYTES - pixels.nbytes)
        written = None
        if self._copies is not None and listed.targets != Targets(None, None):
            write = partial(_write, self._copies, record, listed.targets, pixels, detections)
            written = pool.submit(copy_context().run, write)
        self._pending.append(_Pending(record, pixels.nbytes if written else 0, written))
        if written is None:
            self.settle(held_bytes=detect_reading.HELD_BYTES)

    def _report(self, name: str) -> None:
        self.worked += 1
        self._on_progress(Progress(self._done + self.worked, self._total, self._failed, self._objects, name))


def _write(
    copies: Copies, record: PictureRecord, targets: Targets, pixels: NDArray[np.uint8], detections: Detections
) -> PictureRecord:
    with stage("draw and write"):
        return copies.write(record, targets, pixels, detections)


def _in_whole(found: Detections, reading: Reading) -> Detections:
    """Give boxes found in a reduced picture in px-img of the whole one; its last pixels may reach beyond that."""
    if reading.factor == 1:
        return found
    height, width = reading.size
    whole = torch.tensor([width, height, width, height], dtype=found.boxes.dtype)
    return Detections((found.boxes * reading.factor).minimum(whole), found.scores, found.labels)


def _of_labels(found: Detections, labels: frozenset[int] | None) -> Detections:
    if labels is None:
        return found
    kept = torch.isin(found.labels, torch.tensor(sorted(labels)))
    return Detections(found.boxes[kept], found.scores[kept], found.labels[kept])
