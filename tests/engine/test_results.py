"""The document `detections.json`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
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
from refinedet_cli.engine.predict import Predictor
from refinedet_cli.engine.results import (
    ClassCount,
    ClassTally,
    Origin,
    PictureRecord,
    PictureResult,
    detection_rows,
    origin_of,
    read_results,
    write_records,
    write_results,
    write_results_list,
)
from refinedet_cli.errors import DataError
from refinedet_cli.zoo.checkpoint import LoadedDetector

CLASSES = Classes(names=("person", "cat", "dog"), category_ids=(1, 17, 18))
ORIGIN = Origin(
    weights="w.safetensors",
    sha256="00",
    preset="tiny",
    engine="torch",
    precision="fp32",
    decoder="x",
    score_threshold=0.3,
)


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


def record(picture: PictureResult) -> PictureRecord:
    rows = tuple(detection_rows(picture.detections, CLASSES))
    return PictureRecord(
        picture.image_id, Path(picture.file_name), picture.file_name, picture.width, picture.height, rows
    )


BAD = PictureRecord(9, Path("/tmp/x/bad.jpg"), "bad.jpg", 0, 0, problem="is empty")


def test_the_whole_document(tmp_path):
    write_records(tmp_path / "d.json", [record(PICTURES[0]), BAD, record(PICTURES[1])], CLASSES, ORIGIN)
    document = json.loads((tmp_path / "d.json").read_text())
    # Written piece by piece, yet as json would write it.
    assert (tmp_path / "d.json").read_text() == json.dumps(document) + "\n"
    assert document == {
        "info": {
            "description": "Objects found by refinedet",
            "version": __version__,
            "weights": "w.safetensors",
            "sha256": "00",
            "preset": "tiny",
            "engine": "torch",
            "precision": "fp32",
            "decoder": "x",
            "score_threshold": 0.3,
            "multi_scale": None,
            "tiles": None,
            "only_classes": None,
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
    assert [i["id"] for i in document["images"]] == [3, 1, 2]
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


def counts(pictures) -> tuple[ClassCount, ...]:
    tally = ClassTally(CLASSES)
    for picture in pictures:
        tally.add(detection_rows(picture.detections, CLASSES))
    return tally.counts()


def test_counts_of_classes():
    assert counts(PICTURES) == (
        ClassCount(name="cat", category_id=17, pictures=2, objects=3, best_score=0.876543),
        ClassCount(name="dog", category_id=18, pictures=1, objects=1, best_score=0.5),
    )
    assert counts(PICTURES[1:2]) == ()


def test_equally_frequent_classes_come_in_the_detectors_order():
    picture = PictureResult(1, "a", 9, 9, found(((0, 0, 1, 1), 0.9, 3), ((0, 0, 1, 1), 0.8, 1)))
    assert [count.name for count in counts([picture])] == ["person", "dog"]


def test_origin_names_the_file_without_its_folder(tmp_path):
    path = tmp_path / "signs.safetensors"
    path.write_bytes(b"weights")
    detector = Detector(tiny(CLASSES).detector, torch.nn.Identity(), criterion=None, decoder=None)
    loaded = LoadedDetector(detector, {}, path)
    origin = origin_of(Predictor(loaded, device=torch.device("cpu"), precision="bf16"), score_threshold=0.25)
    assert (origin.weights, origin.preset, origin.precision) == ("signs.safetensors", "tiny", "bf16")
    assert origin.engine == f"torch {torch.__version__}"
    assert origin.score_threshold == 0.25
    assert origin.sha256 == hashlib.sha256(b"weights").hexdigest()
    assert "Pillow" in origin.decoder
    assert "full size" in origin.decoder


def test_what_was_written_is_read_back(tmp_path):
    path = tmp_path / "detections.json"
    write_results(path, PICTURES, CLASSES, ORIGIN)
    saved = read_results(path)
    assert (saved.path, saved.format, len(saved)) == (path, "detections.json", 4)
    assert saved.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert saved.classes == CLASSES
    assert saved.pictures == {3: "a b/ü.jpg", 1: "empty.png", 2: "c.png"}
    assert (saved.info["weights"], saved.notes) == ("w.safetensors", ())
    assert saved.image_ids.tolist() == [3, 3, 2, 2]
    assert saved.category_ids.tolist() == [17, 18, 17, 17]
    np.testing.assert_array_equal(saved.boxes[:2], [[1, 2, 11.5, 22.25], [0, 0, 40, 30]])
    assert saved.scores.tolist() == [0.876543, 0.5, 0.75, 0.25]


def test_a_run_that_did_not_go_through_is_told(tmp_path):
    write_records(tmp_path / "d.json", [*map(record, PICTURES), BAD], CLASSES, ORIGIN, complete=False)
    stopped, failed = read_results(tmp_path / "d.json").notes
    assert "stopped before its end" in stopped
    assert "1 picture failed" in failed


def test_the_list_of_results_that_is_written_is_read_back(tmp_path):
    path = tmp_path / "results.json"
    write_results_list(path, [*map(record, PICTURES), BAD])
    saved, whole = read_results(path), tmp_path / "d.json"
    write_results(whole, PICTURES, CLASSES, ORIGIN)
    assert saved.format == "results list"
    np.testing.assert_array_equal(saved.boxes, read_results(whole).boxes)
    np.testing.assert_array_equal(saved.scores, read_results(whole).scores)
    assert (saved.image_ids.tolist(), saved.category_ids.tolist()) == ([3, 3, 2, 2], [17, 18, 17, 17])
    assert json.loads(path.read_text())[0] == {
        "image_id": 3, "category_id": 17, "bbox": [1.0, 2.0, 10.5, 20.25], "score": 0.876543,
    }  # fmt: skip


RESULT = {"image_id": 7, "category_id": 3, "bbox": [1, 2.5, 3, 4], "score": 0.5}


def test_a_list_of_results(tmp_path):
    path = tmp_path / "results.json"
    odd = {"image_id": 8.0, "category_id": 3, "bbox": [-5, 0, 0, 1], "score": -2, "segmentation": []}
    path.write_text(json.dumps([RESULT, odd]))
    saved = read_results(path)
    assert (saved.format, saved.classes, saved.pictures, dict(saved.info)) == ("results list", None, None, {})
    assert (saved.image_ids.tolist(), saved.category_ids.tolist()) == ([7, 8], [3, 3])
    np.testing.assert_array_equal(saved.boxes, [[1, 2.5, 4, 6.5], [-5, 0, -5, 1]])
    assert saved.scores.tolist() == [0.5, -2.0]


def test_an_empty_list_has_no_detections(tmp_path):
    (tmp_path / "results.json").write_text("[]")
    saved = read_results(tmp_path / "results.json")
    assert (len(saved), saved.boxes.shape) == (0, (0, 4))


def without(key):
    return {k: v for k, v in RESULT.items() if k != key}


SAVED = {"images": [{"id": 7, "file_name": "a"}], "categories": [{"id": 3, "name": "cat"}], "annotations": [RESULT]}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param("", "is empty", id="empty file"),
        pytest.param("[{]", "is not valid JSON", id="no JSON"),
        pytest.param("[" * 100_000, "is not valid JSON", id="nested too deep"),
        pytest.param("[" + "9" * 5000 + "]", "is not valid JSON", id="endless number"),
        pytest.param("3", "holds no detections", id="number"),
        pytest.param('{"images": []}', "holds no detections", id="other object"),
        pytest.param([3], "[0] is a JSON number", id="entry is a number"),
        pytest.param([RESULT, without("score")], "[1] has no 'score'", id="no score"),
        pytest.param([without("bbox")], "[0] has no 'bbox'", id="no box"),
        pytest.param([RESULT | {"image_id": "000007"}], '[0]: image_id is "000007"', id="image id is text"),
        pytest.param([RESULT | {"category_id": 1.5}], "[0]: category_id is 1.5", id="fractional category"),
        pytest.param([RESULT | {"category_id": True}], "[0]: category_id is true", id="category is a truth value"),
        pytest.param([RESULT | {"image_id": 2**70}], "[0]: image_id is 11", id="image id of over 64 bits"),
        pytest.param([RESULT | {"score": float("nan")}], "[0]: score is NaN", id="NaN score"),
        pytest.param([RESULT | {"score": float("inf")}], "[0]: score is Infinity", id="infinite score"),
        pytest.param([RESULT | {"score": None}], "[0]: score is null", id="null score"),
        pytest.param([RESULT | {"score": "0.5"}], '[0]: score is "0.5"', id="score is text"),
        pytest.param([RESULT | {"bbox": [0, 0, float("nan"), 1]}], "[0]: bbox is [0, 0, NaN, 1]", id="NaN in box"),
        pytest.param([RESULT | {"bbox": [0, 0, float("inf"), 1]}], "bbox is [0, 0, Infinity, 1]", id="infinite box"),
        pytest.param([RESULT | {"bbox": [0, 0, 9, -1]}], "bbox is [0, 0, 9, -1]", id="negative height"),
        pytest.param([RESULT | {"bbox": [1e200, 0, 9, 1]}], "bbox is [1e+200, 0, 9, 1]", id="box beyond any picture"),
        pytest.param([RESULT | {"bbox": [0, 0, 9]}], "bbox is [0, 0, 9]", id="three numbers"),
        pytest.param([RESULT | {"bbox": "0 0 9 9"}], 'bbox is "0 0 9 9"', id="box is text"),
        pytest.param(SAVED | {"images": {}}, "images is a JSON object", id="images is no list"),
        pytest.param(SAVED | {"images": SAVED["images"] * 2}, "images[1]: image id 7", id="image twice"),
        pytest.param(SAVED | {"images": [{"id": 7}]}, "images[0] (id 7) has no 'file_name'", id="no file name"),
        pytest.param(SAVED | {"images": [{"id": 7, "file_name": 1}]}, "file_name is 1", id="file name is a number"),
        pytest.param(SAVED | {"categories": []}, "has no categories", id="no categories"),
        pytest.param(SAVED | {"categories": [{"id": 3, "name": ""}]}, 'name is ""', id="class without a name"),
        pytest.param(SAVED | {"categories": SAVED["categories"] * 2}, "categories[1]: id 3", id="class twice"),
        pytest.param(SAVED | {"annotations": [RESULT | {"image_id": 8}]}, "no image with id 8", id="unlisted image"),
        pytest.param(SAVED | {"annotations": [RESULT | {"category_id": 4}]}, "no category with id 4", id="unlisted"),
        pytest.param(SAVED | {"annotations": [without("score")]}, "annotations[0] has no 'score'", id="a data set"),
    ],
)
def test_a_file_that_cannot_be_scored_is_refused_by_name_and_value(tmp_path, content, told):
    path = tmp_path / "results.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError) as caught:
        read_results(path)
    assert str(path) in caught.value.message
    assert told in caught.value.message


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"none\.json does not exist"):
        read_results(tmp_path / "none.json")
