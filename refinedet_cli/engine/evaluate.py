"""Evaluation: a detector over a whole data set, and the numbers that come of it."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from refinedet_cli.core.config import Classes, PostprocessConfig
from refinedet_cli.core.refinedet import build
from refinedet_cli.core.structures import Detections
from refinedet_cli.data.dataset import ClassMatch, Dataset, Record, listed, match_classes, remap
from refinedet_cli.data.loading import read_record
from refinedet_cli.engine.predict import Predictor
from refinedet_cli.engine.results import PictureResult, detection_rows
from refinedet_cli.errors import DataError
from refinedet_cli.metrics.coco import CocoResult, PictureDetections, PictureTruth, evaluate_coco
from refinedet_cli.zoo.checkpoint import LoadedDetector


@dataclass(frozen=True)
class EvaluationProgress:
    """How far an evaluation is: pictures done, and all of them."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What a detector scores on a data set.

    Attributes:
        result: over the scored classes; ``result.per_class[i]`` is that of ``scored_classes[i]``.
        scored_classes: the classes that detector and data set share, named and ordered as in the detector.
        complete: whether every object of the data set was scored as the class it has there. If not, the numbers are of
            the scored classes, and not the data set's.
        pictures: all that was found, also of classes that are not scored, by ascending image id.
        objects: the data set's, crowds and other classes included.
        seconds: that reading the pictures and detecting took.
        notes: what the data set and this evaluation left out or did in a special way, one line each.
    """

    result: CocoResult
    scored_classes: tuple[str, ...]
    complete: bool
    pictures: tuple[PictureResult, ...]
    objects: int
    seconds: float
    notes: tuple[str, ...]

    @property
    def pictures_per_second(self) -> float:
        """Speed of reading and detecting together."""
        return len(self.pictures) / max(self.seconds, 1e-9)


def ignore(progress: EvaluationProgress) -> None:
    """Take no notice of progress."""


def with_postprocess(loaded: LoadedDetector, postprocess: PostprocessConfig) -> LoadedDetector:
    """Give a detector other post-processing; the network is shared, and ``loaded`` stays as it is."""
    config = replace(loaded.config, postprocess=postprocess)
    detector = replace(loaded.detector, config=config, decoder=build(config).decoder)
    return replace(loaded, detector=detector)


def evaluate(
    predictor: Predictor,
    dataset: Dataset,
    *,
    batch: int,
    workers: int,
    on_progress: Callable[[EvaluationProgress], None] = ignore,
) -> Evaluation:
    """Run a detector over a data set and score what it finds with the COCO metric.

    Detections count from the config's ``postprocess.score_threshold`` up, rounded as they are written to
    `detections.json`, so that the file leads anyone to the same numbers.

    Args:
        predictor: its precision and post-processing are part of what is measured.
        dataset: pictures and objects; classes are matched by name, VOC and COCO spellings being equal.
        batch: pictures computed together.
        workers: threads that read pictures ahead.
        on_progress: called after every batch.

    Returns:
        `Evaluation`; it depends neither on ``workers`` nor on the order of the records, and in fp32 on ``batch`` only
        as far as sums of another order move a score's last written decimal.

    Raises:
        DataError: detector and data set share no class, there is no picture, or a picture cannot be read: a number over
            the others would not be the data set's.
    """
    if not dataset.records:
        raise DataError(f"{dataset.name} has no pictures to score", "name another data set or split")
    classes = predictor.classes
    renamed = remap(dataset, classes)
    match = match_classes(classes, dataset.classes)
    records = sorted(renamed.records, key=lambda r: (r.image_id, r.file_name, r.path))
    started = time.perf_counter()
    found: list[Detections] = []
    for images in _batches(records, batch, workers):
        found += predictor.predict(images)
        on_progress(EvaluationProgress(len(found), len(records)))
    seconds = time.perf_counter() - started
    scored = np.zeros(len(classes) + 1, dtype=np.int64)
    for place, name in enumerate(match.shared, start=1):
        scored[classes.names.index(name) + 1] = place
    # Numbered by place: pictures of joined data sets may share an id.
    result = evaluate_coco(
        [_truth(i, record, scored) for i, record in enumerate(records)],
        [_reported(i, detections, classes, scored) for i, detections in enumerate(found)],
        len(match.shared),
    )
    merged = _merged(match, classes, dataset.classes)
    return Evaluation(
        result=result,
        scored_classes=match.shared,
        complete=renamed.objects == dataset.objects and not merged,
        pictures=tuple(
            PictureResult(r.image_id, r.file_name, r.width, r.height, d) for r, d in zip(records, found, strict=True)
        ),
        objects=dataset.objects,
        seconds=seconds,
        notes=(*renamed.notes, *merged, *_remarks(renamed, match)),
    )


def _batches(records: Sequence[Record], batch: int, workers: int) -> Iterator[list[NDArray[np.uint8]]]:
    with closing(_read_ahead(records, workers, batch + workers)) as images:
        while chunk := list(islice(images, batch)):
            yield chunk


def _read_ahead(records: Sequence[Record], workers: int, ahead: int) -> Generator[NDArray[np.uint8]]:
    """Read pictures in order, so many at most before they are asked for."""
    coming = iter(records)
    reading: deque[Future[NDArray[np.uint8]]] = deque()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            reading.extend(pool.submit(read_record, record) for record in islice(coming, ahead))
            while reading:
                image = reading.popleft().result()
                reading.extend(pool.submit(read_record, record) for record in islice(coming, 1))
                yield image
        finally:
            for future in reading:
                future.cancel()


def _truth(image_id: int, record: Record, scored: NDArray[np.int64]) -> PictureTruth:
    return PictureTruth(image_id, record.boxes, scored[record.labels], record.areas, record.crowd)


def _reported(image_id: int, detections: Detections, classes: Classes, scored: NDArray[np.int64]) -> PictureDetections:
    rows = detection_rows(detections, classes)
    boxes = np.array([box for box, _, _ in rows], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    scores = np.array([score for _, score, _ in rows], dtype=np.float64)
    labels = scored[detections.labels.numpy()]
    known = labels > 0
    return PictureDetections(image_id, boxes[known], scores[known], labels[known])


def _merged(match: ClassMatch, classes: Classes, data: Classes) -> tuple[str, ...]:
    """Tell of classes of the data that the detector does not tell apart."""
    times = Counter(match.labels.tolist())
    return tuple(
        f"{listed([name for name, to in zip(data.names, match.labels[1:], strict=True) if to == label])} are one class "
        f"to the detector: {classes.names[label - 1]}"
        for label in sorted(times)
        if label > 0 and times[label] > 1
    )


def _remarks(dataset: Dataset, match: ClassMatch) -> Iterator[str]:
    if match.only_in_model:
        yield (
            f"{len(match.only_in_model):,} classes of the detector are not in the data and are not scored: "
            f"{listed(match.only_in_model)}"
        )
    difficult = sum(int((r.difficult & ~r.crowd).sum()) for r in dataset.records)
    if difficult:
        yield f"{difficult:,} difficult objects count like all others: the COCO metric knows no difficult ones"
    if not any((~r.crowd).any() for r in dataset.records):
        yield "there is no object to be found, so there are no numbers"
