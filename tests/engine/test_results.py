"""The document `detections.json`."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from refinedet_cli import __version__
from refinedet_cli.core.config import Classes
from refinedet_cli.core.detector import Detector
from refinedet_cli.core.presets import tiny
from refinedet_cli.core.structures import Detections
from refinedet_cli.engine.results import (
    ClassCount,
    Failure,
    Origin,
    PictureResult,
    count_classes,
    detection_rows,
    origin_of,
    results_document,
    write_results,
)
from refinedet_cli.errors import DataError
from refinedet_cli.zoo.checkpoint import LoadedDetector

CLASSES = Classes(names=("person", "cat", "dog"), category_ids=(1, 17, 18))
ORIGIN = Origin(weights="w.safetensors", sha256="00", preset="tiny", precision="fp32", decoder="x", score_threshold=0.3)


def found(*rows: tuple[tuple[float, float, float, float], float, int]) -> Detections:
    return Detections(
        boxes=torch.tensor([box for box, _, _ in rows]).reshape(-1, 4).float(),
        scores=torch.tensor([score for _, score, _ in rows]).float(),
        labels=torch.tensor([label for _, _, label in rows], dtype=torch.int64),
    )


PICTURES = (
    PictureResult(3, "a b/ü.jpg", 40, 30, found(((1.00049, 2, 11.5, 22.25), 0.87654321, 2), ((0, 0, 40, 30), 0.5, 3))),
    PictureResult(1, "empty.png", 8, 9, found()),
    PictureResult(2, "c.png", 100, 50, found(((10, 10, 20, 20), 0.75, 2), ((30, 10, 40, 20), 0.25, 2))),
)


def test_the_whole_document():
    failures = [Failure(path="/tmp/x/bad.jpg", file_name="bad.jpg", reason="is empty")]
    document = results_document(PICTURES[:2], CLASSES, ORIGIN, failures=failures)
    assert document == {
        "info": {
            "description": "Objects found by refinedet",
            "version": __version__,
            "weights": "w.safetensors",
            "sha256": "00",
            "preset": "tiny",
            "precision": "fp32",
            "decoder": "x",
            "score_threshold": 0.3,
            "complete": True,
            "failures": [{"file_name": "bad.jpg", "reason": "is empty"}],
        },
        "images": [
            {"id": 3, "file_name": "a b/ü.jpg", "width": 40, "height": 30},
            {"id": 1, "file_name": "empty.png", "width": 8, "height": 9},
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 3,
                "category_id": 17,
                "bbox": [1.0, 2.0, 10.5, 20.25],
                "area": 212.625,
                "iscrowd": 0,
                "score": 0.876543,
            },
            {
                "id": 2,
                "image_id": 3,
                "category_id": 18,
                "bbox": [0.0, 0.0, 40.0, 30.0],
                "area": 1200.0,
                "iscrowd": 0,
                "score": 0.5,
            },
        ],
    }


def test_the_file_holds_the_document_and_is_the_same_each_time(tmp_path):
    for name in ("one.json", "two.json"):
        write_results(tmp_path / name, PICTURES, CLASSES, ORIGIN, complete=False)
    document = json.loads((tmp_path / "one.json").read_text())
    assert document == results_document(PICTURES, CLASSES, ORIGIN, complete=False)
    assert document["info"]["complete"] is False
    assert [a["id"] for a in document["annotations"]] == [1, 2, 3, 4]
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_pycocotools_reads_it(tmp_path, capsys):
    write_results(tmp_path / "d.json", PICTURES, CLASSES, ORIGIN)
    coco = COCO(str(tmp_path / "d.json"))
    assert coco.getImgIds(catIds=[17]) == [2, 3]
    assert [a["score"] for a in coco.loadAnns(coco.getAnnIds(imgIds=[2]))] == [0.75, 0.25]


def test_a_file_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        write_results(tmp_path / "file" / "d.json", PICTURES, CLASSES, ORIGIN)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 9000),
    height=st.integers(1, 9000),
    corners=st.tuples(*[st.floats(0, 1, width=32)] * 4),
)
def test_rounded_boxes_stay_inside_the_picture(width, height, corners):
    x, y = sorted(c * width for c in corners[:2]), sorted(c * height for c in corners[2:])
    ((bbox, _, _),) = detection_rows(found(((x[0], y[0], x[1], y[1]), 0.5, 1)), CLASSES)
    left, top, w, h = bbox
    assert min(bbox) >= 0
    assert round(left + w, 3) <= width
    assert round(top + h, 3) <= height
    torch.testing.assert_close(torch.tensor([left, left + w]), torch.tensor(x), atol=2e-3, rtol=1e-6)


def test_counts_of_classes():
    assert count_classes(PICTURES, CLASSES) == (
        ClassCount(name="cat", category_id=17, pictures=2, objects=3, best_score=0.876543),
        ClassCount(name="dog", category_id=18, pictures=1, objects=1, best_score=0.5),
    )
    assert count_classes(PICTURES[1:2], CLASSES) == ()


def test_equally_frequent_classes_come_in_the_detectors_order():
    picture = PictureResult(1, "a", 9, 9, found(((0, 0, 1, 1), 0.9, 3), ((0, 0, 1, 1), 0.8, 1)))
    assert [count.name for count in count_classes([picture], CLASSES)] == ["person", "dog"]


def test_origin_names_the_file_without_its_folder(tmp_path):
    path = tmp_path / "signs.safetensors"
    path.write_bytes(b"weights")
    detector = Detector(tiny(CLASSES).detector, torch.nn.Identity(), criterion=None, decoder=None)
    origin = origin_of(LoadedDetector(detector, {}, path), precision="bf16", score_threshold=0.25)
    assert (origin.weights, origin.preset, origin.precision) == ("signs.safetensors", "tiny", "bf16")
    assert origin.score_threshold == 0.25
    assert origin.sha256 == hashlib.sha256(b"weights").hexdigest()
    assert "Pillow" in origin.decoder
    assert "full size" in origin.decoder
