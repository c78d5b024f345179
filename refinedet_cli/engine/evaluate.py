"""Evaluation: a detector over a whole data set, and the numbers that come of it."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes, PostprocessConfig
from refinedet_cli.core.structures import Detections
from refinedet_cli.core.words import counted
from refinedet_cli.data.dataset import ClassMatch, Dataset, Record, canonical_name, listed, match_classes, remap
from refinedet_cli.data.loading import read_record
from refinedet_cli.engine.detect_reading import HELD_BYTES
from refinedet_cli.engine.distributed import ALONE, Processes
from refinedet_cli.engine.predict import AnyPredictor
from refinedet_cli.engine.results import PictureResult, SavedDetections, detection_rows
from refinedet_cli.errors import DataError, UsageError
from refinedet_cli.metrics.coco import CocoResult, PictureDetections, PictureTruth, evaluate_coco
from refinedet_cli.metrics.fast_coco import distrust, evaluate_coco_fast, is_installed
from refinedet_cli.metrics.intervals import Rounds, resample_coco, resample_voc
from refinedet_cli.metrics.voc import VocResult, VocRules, evaluate_voc
from refinedet_cli.zoo.checkpoint import LoadedDetector

_NO_OBJECT = "there is no object to be found, so there are no numbers"


@dataclass(frozen=True)
class EvaluationProgress:
    """How far an evaluation is: pictures done, and all of them."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Collected:
    """What was found in a data set beside what is there: all that a number is computed from.

    The pictures are numbered by their place, by ascending image id: those of joined data sets may share an id.

    Attributes:
        classes: those of the detections.
        scored_classes: the classes that detections and data set share, named and ordered as in ``classes``; label ``i``
            of ``truths`` and ``detections`` is ``scored_classes[i - 1]``.
        complete: whether every object of the data set is scored as the class it has there. If not, the numbers are of
            the scored classes, and not the data set's.
        records: the data set's, by ascending image id, with the labels of ``classes`` and without other objects.
        truths: the objects of each of ``records``.
        difficult: for each of ``truths`` bool[N].
        detections: those of the scored classes in each of ``records``, boxes and scores as they are in files.
        pictures: all that a detector found in each of ``records``, also of classes that are not scored; empty where
            saved detections are scored.
        objects: the data set's, crowds and other classes included.
        seconds: that reading the pictures and detecting took; None for saved detections.
        notes: what was left out or done in a special way, one line each.
    """

    classes: Classes
    scored_classes: tuple[str, ...]
    complete: bool
    records: tuple[Record, ...]
    truths: tuple[PictureTruth, ...]
    difficult: tuple[NDArray[np.bool_], ...]
    detections: tuple[PictureDetections, ...]
    pictures: tuple[PictureResult, ...]
    objects: int
    seconds: float | None
    notes: tuple[str, ...]

    @property
    def pictures_per_second(self) -> float | None:
        """Speed of reading and detecting together."""
        return None if self.seconds is None else len(self.records) / max(self.seconds, 1e-9)


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation(Collected):
    """What was found in a data set, and the COCO metric's numbers of it.

    Attributes:
        result: ``result.per_class[i]`` is that of ``scored_classes[i]``.
    """

    result: CocoResult


class _Paired(NamedTuple):
    """A data set in the words of the detections.

    Attributes:
        dataset: with the labels of the detections' classes.
        records: its, in the order of their places.
        match: of the detections' classes with those that the data set came with.
        scored: int64[C], for each label of the detections' classes that among the scored ones, or 0.
    """

    dataset: Dataset
    records: tuple[Record, ...]
    match: ClassMatch
    scored: NDArray[np.int64]


def ignore(progress: EvaluationProgress) -> None:
    """Take no notice of progress."""


def with_postprocess(loaded: LoadedDetector, postprocess: PostprocessConfig) -> LoadedDetector:
    """Give a detector other post-processing; the network is shared, and ``loaded`` stays as it is."""
    config = replace(loaded.config, postprocess=postprocess)
    detector = replace(loaded.detector, config=config, decoder=build(config).decoder)
    return replace(loaded, detector=detector)


def evaluate(
    predictor: AnyPredictor,
    dataset: Dataset,
    *,
    batch: int,
    workers: int,
    on_progress: Callable[[EvaluationProgress], None] = ignore,
    processes: Processes = ALONE,
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
        processes: that share the pictures, each with the same arguments; all get the whole.

    Returns:
        `Evaluation`; it depends neither on ``workers`` and ``processes`` nor on the order of the records, and in fp32
        on ``batch`` only as far as sums of another order move a score's last written decimal.

    Raises:
        DataError: detector and data set share no class, there is no picture, or a picture cannot be read: a number over
            the others would not be the data set's.
    """
    collected = collect(predictor, dataset, batch=batch, workers=workers, on_progress=on_progress, processes=processes)
    notes = (*collected.notes, *coco_notes(collected))
    result = processes.from_first(lambda: score_coco(collected))
    return Evaluation(**{**vars(collected), "notes": notes}, result=result)


def collect(
    predictor: AnyPredictor,
    dataset: Dataset,
    *,
    batch: int,
    workers: int,
    on_progress: Callable[[EvaluationProgress], None] = ignore,
    processes: Processes = ALONE,
) -> Collected:
    """Run a detector over a data set; arguments, order and errors are those of `evaluate`."""
    paired = _pair(dataset, predictor.classes)
    started = time.perf_counter()
    total = len(paired.records)
    # Whole batches, so that a picture is computed beside the same others however many processes there are.
    own = [i for i in range(total) if i // batch % processes.count == processes.rank]
    mine: list[Detections] = []
    for images in _batches([paired.records[i] for i in own], batch, workers):
        mine += predictor.predict(images)
        on_progress(EvaluationProgress(min(len(mine) * processes.count, total), total))
    found = _in_order(processes.gather(_packed(own, mine)), total) if processes.count > 1 else mine
    seconds = time.perf_counter() - started
    pictures = tuple(
        PictureResult(r.image_id, r.file_name, r.width, r.height, d) for r, d in zip(paired.records, found, strict=True)
    )
    reported = [_reported(i, d, predictor.classes, paired.scored) for i, d in enumerate(found)]
    return _collected(paired, dataset, reported, pictures=pictures, seconds=seconds)


def collect_saved(saved: SavedDetections, dataset: Dataset) -> Collected:
    """Lay saved detections beside the objects of a data set.

    Pictures are found by the file names of a detections.json (by file name and image id where the data set has one name
    twice) and by the image ids of a results list. Pictures without detections are scored as they are: what is in them
    was missed.

    Raises:
        DataError: there is no picture, no class is shared, or a detection is of a picture or category that the data set
            does not have.
    """
    classes = saved.classes or dataset.classes
    if not match_classes(classes, dataset.classes).shared:
        raise DataError(
            f"{saved.path} and {dataset.name} share no class: the file has {listed(classes.names)}; the data has "
            f"{listed(dataset.classes.names)}",
            "score detections on the data that they were made on",
        )
    paired = _pair(dataset, classes)
    places, notes = _places(saved, paired.records, dataset.name)
    label_of = {category_id: label for label, category_id in enumerate(classes.category_ids, start=1)}
    unknown = sorted(set(saved.category_ids.tolist()) - set(label_of))
    if unknown:
        raise DataError(
            f"{saved.path} has detections of categories that {dataset.name} does not have: {_ids(unknown)}",
            f"category ids must be those of the data set: {_ids(classes.category_ids)}",
        )
    labels = paired.scored[np.array([label_of[i] for i in saved.category_ids.tolist()], dtype=np.int64)]
    known = np.flatnonzero(labels)
    order = known[np.argsort(places[known], kind="stable")]
    ends = np.cumsum(np.bincount(places[order], minlength=len(paired.records)))
    reported = [
        PictureDetections(i, saved.boxes[rows], saved.scores[rows], labels[rows])
        for i, rows in enumerate(np.split(order, ends[:-1]))
    ]
    if not len(saved):
        notes = (*notes, f"{saved.path} holds no detection")
    return _collected(paired, dataset, reported, notes=(*saved.notes, *notes))


class Engine(NamedTuple):
    """What computes the COCO metric.

    Attributes:
        score: takes truths, detections and the number of classes.
        description: its name and version.
        notes: why it is not another, if somebody should know.
    """

    score: Callable[[Sequence[PictureTruth], Sequence[PictureDetections], int], CocoResult]
    description: str
    notes: tuple[str, ...] = ()


PYCOCOTOOLS = Engine(evaluate_coco, f"pycocotools {version('pycocotools')}")


def choose_engine(name: Literal["auto", "pycocotools", "hotcoco"]) -> Engine:
    """Choose what computes the COCO metric.

    Args:
        name: "auto" takes hotcoco where it is installed and proves equal to pycocotools, else pycocotools.

    Raises:
        UsageError: hotcoco is asked for and is not installed, or not equal.
    """
    if name == "pycocotools":
        return PYCOCOTOOLS
    reason = distrust()
    if reason is None:
        return Engine(evaluate_coco_fast, f"hotcoco {version('hotcoco')}, proved equal to {PYCOCOTOOLS.description}")
    if name == "hotcoco":
        raise UsageError(f"--engine hotcoco cannot be used: {reason}", "take --engine pycocotools")
    return PYCOCOTOOLS._replace(notes=(reason,) if is_installed() else ())


def score_coco(collected: Collected, engine: Engine = PYCOCOTOOLS) -> CocoResult:
    """Score with the COCO metric; ``per_class[i]`` is that of ``scored_classes[i]``."""
    return engine.score(collected.truths, collected.detections, len(collected.scored_classes))


def score_voc(collected: Collected, rules: VocRules) -> VocResult:
    """Score with the VOC metric; ``per_class[i]`` is that of ``scored_classes[i]``."""
    classes = len(collected.scored_classes)
    return evaluate_voc(collected.truths, collected.detections, classes, difficult=collected.difficult, rules=rules)


def resample(collected: Collected, drawn: NDArray[np.int64], rules: VocRules | None) -> Rounds:
    """Score drawings of the pictures with the VOC metric of ``rules``, or the COCO metric where there are none.

    Args:
        collected: what was found.
        drawn: int64[R, P], how often each of ``collected.records`` was drawn.
        rules: see `VocRules`.

    Returns:
        the numbers; row 0 is of the pictures as they are.
    """
    found = (collected.truths, collected.detections, len(collected.scored_classes), drawn)
    if rules is None:
        return resample_coco(*found)
    return resample_voc(*found, difficult=collected.difficult, rules=rules)


def coco_notes(collected: Collected) -> tuple[str, ...]:
    """Tell what the COCO metric does not tell apart."""
    notes = []
    difficult = sum(int((r.difficult & ~r.crowd).sum()) for r in collected.records)
    if difficult:
        notes.append(f"{difficult:,} difficult objects count like all others: the COCO metric knows no difficult ones")
    if not any((~r.crowd).any() for r in collected.records):
        notes.append(_NO_OBJECT)
    return tuple(notes)


def voc_notes(collected: Collected) -> tuple[str, ...]:
    """Tell what the VOC metric leaves out."""
    notes = []
    difficult = sum(int(r.difficult.sum()) for r in collected.records)
    crowds = sum(int((r.crowd & ~r.difficult).sum()) for r in collected.records)
    if difficult:
        notes.append(f"{difficult:,} difficult objects count neither as found nor as missed")
    if crowds:
        notes.append(f"{crowds:,} crowds count as difficult objects: the VOC metric knows no crowds")
    if not any((~r.crowd & ~r.difficult).any() for r in collected.records):
        notes.append(_NO_OBJECT)
    return tuple(notes)


def in_classes_of(other: Collected, collected: Collected) -> Collected:
    """Give detections the labels of others of the same data set, so that the two can be compared.

    Args:
        other: to be relabelled.
        collected: what it is to be compared with, of the same data set.

    Returns:
        ``other`` with the class order of ``collected``; its ``truths`` are then equal to those of ``collected``.

    Raises:
        DataError: the two do not score the same classes.
    """
    same = set(other.scored_classes) == set(collected.scored_classes)
    ours, theirs = ([name if same else canonical_name(name) for name in c.scored_classes] for c in (collected, other))
    if sorted(ours) != sorted(theirs) or len(set(ours)) != len(ours):
        raise DataError(
            f"the two sets of detections score different classes: {listed(collected.scored_classes)}; and "
            f"{listed(other.scored_classes)}",
            "compare detections of the same classes",
        )
    labels = np.array([0, *(ours.index(name) + 1 for name in theirs)], dtype=np.int64)
    truths = tuple(replace(t, labels=labels[t.labels]) for t in other.truths)
    if any(not np.array_equal(t.labels, o.labels) for t, o in zip(truths, collected.truths, strict=True)):
        raise DataError(
            "the two sets of detections do not give the objects of the data set the same classes",
            "compare detections of the same classes",
        )
    detections = tuple(replace(d, labels=labels[d.labels]) for d in other.detections)
    return replace(other, scored_classes=collected.scored_classes, truths=truths, detections=detections)


def _pair(dataset: Dataset, classes: Classes) -> _Paired:
    if not dataset.records:
        raise DataError(f"{dataset.name} has no pictures to score", "name another data set or split")
    renamed = remap(dataset, classes)
    match = match_classes(classes, dataset.classes)
    scored = np.zeros(len(classes) + 1, dtype=np.int64)
    for place, name in enumerate(match.shared, start=1):
        scored[classes.names.index(name) + 1] = place
    records = tuple(sorted(renamed.records, key=lambda r: (r.image_id, r.file_name, r.path)))
    return _Paired(renamed, records, match, scored)


def _collected(
    paired: _Paired,
    dataset: Dataset,
    detections: Sequence[PictureDetections],
    *,
    pictures: tuple[PictureResult, ...] = (),
    seconds: float | None = None,
    notes: tuple[str, ...] = (),
) -> Collected:
    classes = paired.dataset.classes
    merged = _merged(paired.match, classes, dataset.classes)
    return Collected(
        classes=classes,
        scored_classes=paired.match.shared,
        complete=paired.dataset.objects == dataset.objects and not merged,
        records=paired.records,
        truths=tuple(
            PictureTruth(i, r.boxes, paired.scored[r.labels], r.areas, r.crowd) for i, r in enumerate(paired.records)
        ),
        difficult=tuple(r.difficult for r in paired.records),
        detections=tuple(detections),
        pictures=pictures,
        objects=dataset.objects,
        seconds=seconds,
        notes=(*paired.dataset.notes, *merged, *_unscored(paired.match), *notes),
    )


class _Placed(NamedTuple):
    """int64[N], the place of each detection's picture, and what there is to say."""

    places: NDArray[np.int64]
    notes: tuple[str, ...]


def _places(saved: SavedDetections, records: Sequence[Record], name: str) -> _Placed:
    """Find the pictures of saved detections in the data set."""
    if saved.pictures is None:
        place_of = _by(name, [r.image_id for r in records])
        asked: dict[int, Hashable] = {i: i for i in saved.image_ids.tolist()}
    else:
        file_names = [r.file_name for r in records]
        if len(set(file_names)) == len(file_names):
            _refuse_repeated(saved)
            place_of, asked = _by(name, file_names), dict(saved.pictures)
        else:
            place_of = _by(name, [(r.image_id, r.file_name) for r in records])
            asked = {i: (i, file_name) for i, file_name in saved.pictures.items()}
    unknown = [i for i in sorted(asked) if asked[i] not in place_of]
    if unknown:
        shown = _ids(unknown) if saved.pictures is None else listed([saved.pictures[i] for i in unknown], 5)
        what = "with image id" if saved.pictures is None else "named"
        raise DataError(
            f"{saved.path}: {name} has no picture {what} {shown}",
            "score detections on the data that they were made on; is it another split?",
        )
    notes: tuple[str, ...] = ()
    if saved.pictures is not None and (absent := len(place_of) - len({asked[i] for i in asked})):
        notes = (
            f"{absent:,} of {counted(len(records), 'picture')} not in {saved.path}: objects there count as missed",
        )
    places = {i: place_of[key] for i, key in asked.items()}
    return _Placed(np.array([places[i] for i in saved.image_ids.tolist()], dtype=np.int64), notes)


def _refuse_repeated(saved: SavedDetections) -> None:
    repeated = [name for name, count in Counter((saved.pictures or {}).values()).items() if count > 1]
    if repeated:
        raise DataError(f"{saved.path} lists pictures more than once: {listed(repeated, 5)}", "list each picture once")


def _by(name: str, keys: Sequence[Hashable]) -> dict[Hashable, int]:
    place_of = {key: place for place, key in enumerate(keys)}
    if len(place_of) != len(keys):
        raise DataError(
            f"{name} has pictures that cannot be told apart by image id or file name",
            "give each picture its own image id",
        )
    return place_of


def _ids(values: Sequence[int]) -> str:
    return listed([str(value) for value in values], 10)


def _batches(records: Sequence[Record], batch: int, workers: int) -> Iterator[list[NDArray[np.uint8]]]:
    """Read pictures in order, so many together, or fewer where they are large."""
    group: list[NDArray[np.uint8]] = []
    held = 0
    with closing(_read_ahead(records, workers, batch + workers)) as images:
        for image in images:
            group.append(image)
            held += image.nbytes
            if len(group) == batch or held >= HELD_BYTES:
                yield group
                group, held = [], 0
    if group:
        yield group


def _read_ahead(records: Sequence[Record], workers: int, ahead: int) -> Generator[NDArray[np.uint8]]:
    """Read pictures in order, so many at most before they are asked for, or fewer where they are large."""
    coming = deque(records)
    reading: deque[Future[NDArray[np.uint8]]] = deque()
    held = 0
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            while coming or reading:
                while coming and len(reading) < ahead and (not reading or held < HELD_BYTES):
                    held += coming[0].width * coming[0].height * 3
                    reading.append(pool.submit(read_record, coming.popleft()))
                image = reading.popleft().result()
                held -= image.nbytes
                yield image
        finally:
            for future in reading:
                future.cancel()


class _Packed(NamedTuple):
    """Detections of some pictures, in few arrays: the places of the pictures, how many each has, and all joined."""

    places: list[int]
    counts: list[int]
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]


def _packed(places: list[int], found: Sequence[Detections]) -> _Packed:
    return _Packed(
        places,
        [len(d) for d in found],
        np.concatenate([np.zeros((0, 4), np.float32), *(d.boxes.numpy() for d in found)]),
        np.concatenate([np.zeros(0, np.float32), *(d.scores.numpy() for d in found)]),
        np.concatenate([np.zeros(0, np.int64), *(d.labels.numpy() for d in found)]),
    )


def _in_order(packed: Sequence[_Packed], total: int) -> list[Detections]:
    """Unpack the detections of all processes, by the places of their pictures."""
    found: dict[int, Detections] = {}
    for part in packed:
        ends = np.cumsum(part.counts, dtype=np.int64)
        for place, count, end in zip(part.places, part.counts, ends.tolist(), strict=True):
            rows = slice(end - count, end)
            arrays = (part.boxes[rows], part.scores[rows], part.labels[rows])
            found[place] = Detections(*map(torch.from_numpy, arrays))
    return [found[place] for place in range(total)]


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


def _unscored(match: ClassMatch) -> tuple[str, ...]:
    if not match.only_in_model:
        return ()
    unknown = counted(len(match.only_in_model), "class of the detector is", "classes of the detector are")
    return (f"{unknown} not in the data and not scored: {listed(match.only_in_model)}",)
