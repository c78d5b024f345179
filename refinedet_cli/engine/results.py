"""The file `detections.json`: a COCO data set whose annotations carry scores, and that says how it was made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL

from refinedet_cli import __version__
from refinedet_cli.core.config import Classes
from refinedet_cli.core.structures import Detections
from refinedet_cli.data.files import write_json
from refinedet_cli.zoo.checkpoint import LoadedDetector, file_sha256

RESULTS_NAME = "detections.json"

_BOX_DECIMALS = 3
_SCORE_DECIMALS = 6


@dataclass(frozen=True)
class Origin:
    """How detections were made, as far as it decides their values.

    Attributes:
        weights: name of the weights file, without its folder.
        sha256: of that file.
        preset: what the detector was built from.
        precision: "fp32" or "bf16".
        decoder: what turned files into pixels.
        score_threshold: detections below it were left out.
    """

    weights: str
    sha256: str
    preset: str
    precision: str
    decoder: str
    score_threshold: float


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


def origin_of(loaded: LoadedDetector, *, precision: str, score_threshold: float) -> Origin:
    """Describe a detector as it is used, hashing its weights file."""
    return Origin(
        weights=loaded.path.name,
        sha256=file_sha256(loaded.path),
        preset=loaded.config.preset,
        precision=precision,
        decoder=f"Pillow {PIL.__version__}, full size",
        score_threshold=score_threshold,
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
            "precision": origin.precision,
            "decoder": origin.decoder,
            "score_threshold": origin.score_threshold,
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
