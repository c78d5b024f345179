"""The file `detections.json`: a COCO data set whose annotations carry scores, and that says how it was made."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray

from refinedet_cli import __version__
from refinedet_cli.core.config import Classes, to_dict
from refinedet_cli.core.multi_scale import ScaleSchedule
from refinedet_cli.core.structures import Detections
from refinedet_cli.core.tiling import Tiling
from refinedet_cli.core.words import counted
from refinedet_cli.data.images import open_regular
from refinedet_cli.data.json_entries import category_names, get, is_number, list_of, shown, whole
from refinedet_cli.engine.predict import AnyPredictor
from refinedet_cli.engine.tiling import tiling_of
from refinedet_cli.errors import DataError
from refinedet_cli.files import whole_file
from refinedet_cli.zoo.checkpoint import file_sha256

RESULTS_NAME = "detections.json"

_REDUCED = "large JPEGs reduced"
_BOX_DECIMALS = 3
_SCORE_DECIMALS = 6
# No picture is as large; beyond it, areas would overflow.
_MAX_PIXEL = 2**31


@dataclass(frozen=True)
class Origin:
    """How detections were made, as far as it decides their values.

    Attributes:
        weights: name of the weights file, without its folder.
        sha256: of that file.
        preset: what the detector was built from.
        engine: the library that computed it, with its version.
        precision: of the network, such as "fp32".
        decoder: what turned files into pixels, and whether in full.
        score_threshold: detections below it were left out.
        multi_scale: the passes over each picture and their voting; None where it was looked at once.
        tiles: how larger pictures were cut; None where they were not.
        only_classes: all others were left out; None where none was.
    """

    weights: str
    sha256: str
    preset: str
    engine: str
    precision: str
    decoder: str
    score_threshold: float
    multi_scale: ScaleSchedule | None = None
    tiles: Tiling | None = None
    only_classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class PictureResult:
    """What was found in one picture.

    Attributes:
        image_id: unique among the pictures.
        file_name: relative, with forward slashes.
        width, height: of the picture as it is seen, px-img.
        detections: best first.
    """

    image_id: int
    file_name: str
    width: int
    height: int
    detections: Detections


class Row(NamedTuple):
    """One detection, rounded as it is written: ``bbox`` is left, top, width, height, px-img."""

    bbox: list[float]
    score: float
    category_id: int


@dataclass(frozen=True)
class PictureRecord:
    """What a run has to say of one picture.

    Attributes:
        image_id: unique among the pictures.
        path: the file it comes from.
        file_name: its relative name among the pictures of the run, with forward slashes.
        width, height: as it is seen, px-img; 0 where it could not be read.
        rows: what was found, best first.
        annotated: the drawn copy; None where none was asked for or it could not be written.
        crops: the objects cut out, in the order of ``rows``.
        problem: why it could not be read, or something of it not be written, and how to mend it, in one line.
    """

    image_id: int
    path: Path
    file_name: str
    width: int
    height: int
    rows: tuple[Row, ...] = ()
    annotated: Path | None = None
    crops: tuple[Path, ...] = ()
    problem: str | None = None

    @property
    def was_read(self) -> bool:
        """Whether there were pixels to look at."""
        return self.width > 0


@dataclass(frozen=True)
class ClassCount:
    """How often one class was found.

    Attributes:
        name, category_id: the class.
        pictures: those with at least one object of it.
        objects: all its detections.
        best_score: of the highest scored one.
    """

    name: str
    category_id: int
    pictures: int
    objects: int
    best_score: float


def origin_of(
    predictor: AnyPredictor,
    *,
    score_threshold: float,
    only_classes: tuple[str, ...] | None = None,
    reduced: bool = False,
) -> Origin:
    """Describe a detector as it is used, hashing its weights file; ``reduced`` tells that large JPEGs are."""
    return Origin(
        weights=predictor.path.name,
        sha256=file_sha256(predictor.path),
        preset=predictor.config.preset,
        engine=predictor.engine,
        precision=predictor.precision,
        decoder=f"Pillow {PIL.__version__}, {_REDUCED if reduced else 'full size'}",
        score_threshold=score_threshold,
        multi_scale=predictor.schedule,
        tiles=tiling_of(predictor),
        only_classes=only_classes,
    )


class ClassTally:
    """Counts what was found, picture by picture."""

    def __init__(self, classes: Classes) -> None:
        self._classes = classes
        self._pictures: Counter[int] = Counter()
        self._objects: Counter[int] = Counter()
        self._best: dict[int, float] = {}

    def add(self, rows: Sequence[Row]) -> None:
        """Count the detections of one picture."""
        self._pictures.update({row.category_id for row in rows})
        self._objects.update(row.category_id for row in rows)
        for row in rows:
            self._best[row.category_id] = max(row.score, self._best.get(row.category_id, 0.0))

    def counts(self) -> tuple[ClassCount, ...]:
        """Sum up, for the classes that were found at all.

        Returns:
            the most frequent class first, in the detector's order where two are equal; the objects add up to all
            detections.
        """
        named = zip(self._classes.names, self._classes.category_ids, strict=True)
        counts = [
            ClassCount(name, i, self._pictures[i], self._objects[i], self._best[i])
            for name, i in named
            if i in self._objects
        ]
        return tuple(sorted(counts, key=lambda count: -count.objects))


def write_results(
    path: Path, pictures: Iterable[PictureResult], classes: Classes, origin: Origin, *, complete: bool = True
) -> None:
    """Write what was found as a COCO data set with scores: `write_records` for detections in memory.

    Raises:
        DataError: the file cannot be written; what was there before is untouched.
    """
    records = [
        PictureRecord(
            p.image_id, Path(p.file_name), p.file_name, p.width, p.height, tuple(detection_rows(p.detections, classes))
        )
        for p in pictures
    ]
    write_records(path, records, classes, origin, complete=complete)


def write_records(
    path: Path, records: Iterable[PictureRecord], classes: Classes, origin: Origin, *, complete: bool = True
) -> None:
    """Write a COCO data set with scores, one entry after the other, so that it need not fit into memory.

    It depends on nothing but the arguments: annotation ids count from 1, and no date is written. Boxes stay inside
    their pictures when rounded.

    Args:
        path: the file to write or replace.
        records: in the order in which they and their annotations are listed; gone through three times. Those with a
            problem are listed in ``info``.
        classes: every class becomes a category, found or not.
        origin: goes into ``info`` with the version of this tool.
        complete: whether the run went through to its end.

    Raises:
        DataError: the file cannot be written; what was there before is untouched.
    """
    info = {
        "description": "Objects found by refinedet",
        "version": __version__,
        **to_dict(origin),
        "complete": complete,
    }
    categories = [
        {"id": category_id, "name": name} for category_id, name in zip(classes.category_ids, classes.names, strict=True)
    ]
    with whole_file(path) as file:
        file.write(b'{"info": ' + _json(info)[:-1] + b', "failures": ')
        _write_list(file, ({"file_name": r.file_name, "reason": r.problem} for r in records if r.problem is not None))
        file.write(b'}, "images": ')
        _write_list(
            file,
            (
                {"id": r.image_id, "file_name": r.file_name, "width": r.width, "height": r.height}
                for r in records
                if r.was_read
            ),
        )
        file.write(b', "categories": ' + _json(categories) + b', "annotations": ')
        _write_list(file, _annotations(records))
        file.write(b"}\n")


def write_results_list(path: Path, records: Iterable[PictureRecord]) -> None:
    """Write the list of results that COCO's tools exchange.

    Raises:
        DataError: the file cannot be written; what was there before is untouched.
    """
    with whole_file(path) as file:
        _write_list(
            file, ({"image_id": record.image_id, **row_document(row)} for record in records for row in record.rows)
        )
        file.write(b"\n")


def row_document(row: Row) -> dict[str, Any]:
    """Give a detection the names that COCO has for its parts."""
    return {"category_id": row.category_id, "bbox": row.bbox, "score": row.score}


def _annotations(records: Iterable[PictureRecord]) -> Iterator[dict[str, Any]]:
    identity = 0
    for record in records:
        for row in record.rows:
            identity += 1
            yield {
                "id": identity,
                "image_id": record.image_id,
                "category_id": row.category_id,
                "bbox": row.bbox,
                "area": round(row.bbox[2] * row.bbox[3], _BOX_DECIMALS),
                "iscrowd": 0,
                "score": row.score,
            }


def _write_list(file: BinaryIO, entries: Iterable[dict[str, Any]]) -> None:
    file.write(b"[")
    for index, entry in enumerate(entries):
        file.write((b", " if index else b"") + _json(entry))
    file.write(b"]")


def _json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode()


def detection_rows(detections: Detections, classes: Classes) -> list[Row]:
    """Turn N detections into N rows, rounded as they are written."""
    # Edges are rounded before sizes are taken, so that right = left + width is never beyond the picture.
    edges = [[round(v, _BOX_DECIMALS) for v in box] for box in detections.boxes.tolist()]
    return [
        Row(
            [left, top, round(right - left, _BOX_DECIMALS), round(bottom - top, _BOX_DECIMALS)],
            round(score, _SCORE_DECIMALS),
            classes.category_ids[label - 1],
        )
        for (left, top, right, bottom), score, label in zip(
            edges, detections.scores.tolist(), detections.labels.tolist(), strict=True
        )
    ]


@dataclass(frozen=True, eq=False)
class SavedDetections:
    """Detections read from a file.

    Attributes:
        path: the file.
        sha256: of its content.
        format: "detections.json", a COCO data set with scores, or "results list", the list that COCO's tools exchange.
        classes: those of a detections.json; None for a results list, whose category ids are those of the data set.
        pictures: file name by image id, of a detections.json; None for a results list.
        info: what a detections.json says of how it was made; may be empty.
        image_ids, category_ids: int64[N], in the file's order.
        boxes: float64[N, 4], xyxy, px-img, as in the file: they may reach out of the picture and have no area.
        scores: float64[N], any finite numbers.
        notes: what one should know of the file, one line each.
    """

    path: Path
    sha256: str
    format: Literal["detections.json", "results list"]
    classes: Classes | None
    pictures: Mapping[int, str] | None
    info: Mapping[str, Any]
    image_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.scores)


def read_results(path: Path) -> SavedDetections:
    """Read saved detections: a file as `write_records` writes it, or a list of COCO results.

    Raises:
        DataError: the file cannot be read, or an entry is not what it should be; names the file, the entry and the
            value. A score or a box that is not finite and a size below 0 are refused, for no number could be right.
    """
    with open_regular(path) as file:
        content = file.read()
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error})", "was it copied whole?") from None
    sha256 = hashlib.sha256(content).hexdigest()
    if isinstance(document, list):
        rows = _detection_columns(document, str(path))
        return SavedDetections(path, sha256, "results list", None, None, {}, *rows.arrays())
    if not isinstance(document, dict) or any(k not in document for k in ("images", "categories", "annotations")):
        raise DataError(
            f"{path} holds no detections",
            "expected a detections.json, or a list of COCO results with image_id, category_id, bbox and score",
        )
    pictures = _picture_names(list_of(document, "images", path), path)
    names = category_names(list_of(document, "categories", path), path)
    classes = Classes(names=tuple(names.values()), category_ids=tuple(names))
    rows = _detection_columns(list_of(document, "annotations", path), f"{path}: annotations")
    known = set(classes.category_ids)
    for index, (image_id, category_id) in enumerate(zip(rows.image_ids, rows.category_ids, strict=True)):
        if image_id not in pictures or category_id not in known:
            kind, value = ("image", image_id) if image_id not in pictures else ("category", category_id)
            raise DataError(f"{path}: annotations[{index}]: there is no {kind} with id {value} in the file")
    info = document.get("info")
    info = info if isinstance(info, dict) else {}
    notes = _notes(info, path)
    return SavedDetections(path, sha256, "detections.json", classes, pictures, info, *rows.arrays(), notes)


class _Arrays(NamedTuple):
    image_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]


@dataclass
class _Columns:
    """Entries as columns; boxes are xywh."""

    image_ids: list[int] = field(default_factory=list)
    category_ids: list[int] = field(default_factory=list)
    boxes: list[list[float]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def arrays(self) -> _Arrays:
        boxes = np.array(self.boxes, dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        image_ids, category_ids = np.array(self.image_ids, np.int64), np.array(self.category_ids, np.int64)
        return _Arrays(image_ids, category_ids, boxes, np.array(self.scores, np.float64))


def _detection_columns(entries: list[Any], where: str) -> _Columns:
    columns = _Columns()
    for index, entry in enumerate(entries):
        place = f"{where}[{index}]"
        columns.image_ids.append(whole(entry, "image_id", place))
        columns.category_ids.append(whole(entry, "category_id", place))
        box = get(entry, "bbox", place)
        if "score" not in entry:
            raise DataError(f"{place} has no 'score'", "is this the data set instead of detections?")
        score = entry["score"]
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_pixel, box)) or box[2] < 0 or box[3] < 0:
            raise DataError(
                f"{place}: bbox is {shown(box)}",
                "it must be left, top, width and height in pixels, finite, width and height not negative",
            )
        if not is_number(score) or not math.isfinite(score):
            raise DataError(f"{place}: score is {shown(score)}", "it must be a finite number")
        columns.boxes.append([float(v) for v in box])
        columns.scores.append(float(score))
    return columns


def _picture_names(entries: list[Any], path: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for index, entry in enumerate(entries):
        where = f"{path}: images[{index}]"
        identity, name = whole(entry, "id", where), get(entry, "file_name", where)
        if not isinstance(name, str):
            raise DataError(f"{where}: file_name is {shown(name)}", "it must be the path of a picture")
        if identity in names:
            raise DataError(f"{where}: image id {identity} is there already", "give each picture its own id")
        names[identity] = name
    return names


def _notes(info: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    notes = []
    if info.get("complete") is False:
        notes.append(f"{path} is of a run that was stopped before its end")
    if isinstance(failures := info.get("failures"), list) and failures:
        notes.append(f"{path} is of a run in which {counted(len(failures), 'picture')} failed")
    if str(info.get("decoder", "")).endswith(_REDUCED):
        notes.append(f"{path} is of a run that read large JPEGs at reduced size, so scores differ a little from eval's")
    return tuple(notes)


def _is_pixel(value: Any) -> bool:
    return is_number(value) and abs(value) <= _MAX_PIXEL
