"""The file `detections.json`: a COCO data set whose annotations carry scores, and that says how it was made."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray

from refinedet_cli import __version__
from refinedet_cli.core.config import Classes, to_dict
from refinedet_cli.core.multi_scale import ScaleSchedule
from refinedet_cli.core.structures import Detections
from refinedet_cli.data.files import write_json
from refinedet_cli.data.images import open_regular
from refinedet_cli.data.json_entries import category_names, get, is_number, list_of, shown, whole
from refinedet_cli.engine.predict import AnyPredictor
from refinedet_cli.errors import DataError
from refinedet_cli.zoo.checkpoint import file_sha256

RESULTS_NAME = "detections.json"

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
        decoder: what turned files into pixels.
        score_threshold: detections below it were left out.
        multi_scale: the passes over each picture and their voting; None where it was looked at once.
    """

    weights: str
    sha256: str
    preset: str
    engine: str
    precision: str
    decoder: str
    score_threshold: float
    multi_scale: ScaleSchedule | None = None


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


@dataclass(frozen=True)
class Failure:
    """A picture that could not be read, or whose annotated copy could not be written.

    Attributes:
        path: the file it comes from.
        file_name: its relative name among the pictures of the run.
        reason: what is wrong and how to mend it, in one line.
    """

    path: Path
    file_name: str
    reason: str


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


def origin_of(predictor: AnyPredictor, *, score_threshold: float) -> Origin:
    """Describe a detector as it is used, hashing its weights file."""
    return Origin(
        weights=predictor.path.name,
        sha256=file_sha256(predictor.path),
        preset=predictor.config.preset,
        engine=predictor.engine,
        precision=predictor.precision,
        decoder=f"Pillow {PIL.__version__}, full size",
        score_threshold=score_threshold,
        multi_scale=predictor.schedule,
    )


def count_classes(pictures: Iterable[PictureResult], classes: Classes) -> tuple[ClassCount, ...]:
    """Count what was found, for the classes that were found at all.

    Returns:
        the most frequent class first, in the detector's order where two are equal; the objects add up to all
        detections.
    """
    in_pictures: dict[int, int] = {}
    scores: dict[int, list[float]] = {}
    for picture in pictures:
        labels = picture.detections.labels.tolist()
        for label in set(labels):
            in_pictures[label] = in_pictures.get(label, 0) + 1
        for label, score in zip(labels, picture.detections.scores.tolist(), strict=True):
            scores.setdefault(label, []).append(score)
    return tuple(
        ClassCount(
            name=classes.names[label - 1],
            category_id=classes.category_ids[label - 1],
            pictures=in_pictures[label],
            objects=len(scores[label]),
            best_score=rounded_score(max(scores[label])),
        )
        for label in sorted(scores, key=lambda label: (-len(scores[label]), label))
    )


def results_document(
    pictures: Iterable[PictureResult],
    classes: Classes,
    origin: Origin,
    *,
    failures: Sequence[Failure] = (),
    complete: bool = True,
) -> dict[str, Any]:
    """Build the document that `write_results` writes.

    Args:
        pictures: in the order in which they and their annotations are listed.
        classes: every class becomes a category, found or not.
        origin: goes into ``info`` with the version of this tool.
        failures: pictures that are missing, or not drawn, and why.
        complete: whether the run went through to its end.

    Returns:
        a COCO data set. It depends on nothing but the arguments: annotation ids count from 1, and no date is written.
        Boxes stay inside their pictures when rounded.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for picture in pictures:
        images.append(
            {
                "id": picture.image_id,
                "file_name": picture.file_name,
                "width": picture.width,
                "height": picture.height,
            }
        )
        for bbox, score, category_id in detection_rows(picture.detections, classes):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": picture.image_id,
                    "category_id": category_id,
                    "bbox": bbox,
                    "area": round(bbox[2] * bbox[3], _BOX_DECIMALS),
                    "iscrowd": 0,
                    "score": score,
                }
            )
    return {
        "info": {
            "description": "Objects found by refinedet",
            "version": __version__,
            "weights": origin.weights,
            "sha256": origin.sha256,
            "preset": origin.preset,
            "engine": origin.engine,
            "precision": origin.precision,
            "decoder": origin.decoder,
            "score_threshold": origin.score_threshold,
            "multi_scale": None if origin.multi_scale is None else to_dict(origin.multi_scale),
            "complete": complete,
            "failures": [{"file_name": f.file_name, "reason": f.reason} for f in failures],
        },
        "images": images,
        "categories": [
            {"id": category_id, "name": name}
            for category_id, name in zip(classes.category_ids, classes.names, strict=True)
        ],
        "annotations": annotations,
    }


def write_results(
    path: Path,
    pictures: Iterable[PictureResult],
    classes: Classes,
    origin: Origin,
    *,
    failures: Sequence[Failure] = (),
    complete: bool = True,
) -> None:
    """Write a COCO data set with scores; the arguments are those of `results_document`.

    Raises:
        DataError: the file cannot be written; what was there before is untouched.
    """
    write_json(path, results_document(pictures, classes, origin, failures=failures, complete=complete))


def detection_rows(detections: Detections, classes: Classes) -> list[tuple[list[float], float, int]]:
    """Turn detections into plain (bbox, score, category id) rows, rounded as they are written.

    Returns:
        N rows; ``bbox`` is left, top, width, height, px-img.
    """
    # Edges are rounded before sizes are taken, so that right = left + width is never beyond the picture.
    edges = [[round(v, _BOX_DECIMALS) for v in box] for box in detections.boxes.tolist()]
    return [
        (
            [left, top, round(right - left, _BOX_DECIMALS), round(bottom - top, _BOX_DECIMALS)],
            rounded_score(score),
            classes.category_ids[label - 1],
        )
        for (left, top, right, bottom), score, label in zip(
            edges, detections.scores.tolist(), detections.labels.tolist(), strict=True
        )
    ]


def rounded_score(score: float) -> float:
    """Round a score to the decimals that are written."""
    return round(score, _SCORE_DECIMALS)


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
    """Read saved detections: a file as `write_results` writes it, or a list of COCO results.

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
        notes.append(f"{path} is of a run in which {len(failures):,} pictures failed")
    return tuple(notes)


def _is_pixel(value: Any) -> bool:
    return is_number(value) and abs(value) <= _MAX_PIXEL
