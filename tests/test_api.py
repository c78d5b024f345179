"""The Python face gives what the commands give."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from refinedet_cli import api
from refinedet_cli.api import Detector, Found
from refinedet_cli.cli.detect import detect
from refinedet_cli.cli.train import train as train_command
from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import tiny
from refinedet_cli.engine.predict import Predictor
from refinedet_cli.errors import CheckpointError, DataError, UsageError
from refinedet_cli.zoo.checkpoint import file_sha256, read_header

CLASSES = Classes(names=("stop", "yield"), category_ids=(30, 7))
SCORE = 0.4


@pytest.fixture(scope="module")
def weights(tmp_path_factory, save_random) -> Path:
    return save_random(tmp_path_factory.mktemp("weights") / "random.safetensors", tiny(CLASSES).detector)


@pytest.fixture(scope="module")
def detector(weights) -> Detector:
    return Detector.load(weights, device="cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i, (height, width) in enumerate([(48, 80), (60, 50), (33, 64)]):
        picture = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 1 else 1  # the second one lies on its side
        picture.save(folder / f"{i}.png", exif=exif)
    return sorted(folder.iterdir())


def assert_equal(a: Found, b: Found) -> None:
    assert len(a) > 0
    for name in ("boxes", "scores", "labels"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert (a.names, a.width, a.height) == (b.names, b.width, b.height)


def test_what_is_found_is_plain(detector, pictures):
    found = detector.predict(pictures[1], score=SCORE)
    assert (found.boxes.dtype, found.scores.dtype, found.labels.dtype) == (np.float32, np.float32, np.int64)
    assert found.boxes.shape == (len(found), 4)
    assert found.scores.min() >= SCORE
    assert (np.diff(found.scores) <= 0).all()
    assert (found.width, found.height, found.path) == (60, 50, pictures[1])
    assert found.names == tuple(detector.classes[label] for label in found.labels)
    assert set(found.names) == {"stop", "yield"}
    assert str(found).splitlines()[0].startswith(f"{found.names[0]} {found.scores[0]:.2f} at ")


def test_a_picture_may_be_given_in_any_form(detector, pictures):
    for path in pictures:
        expected = detector.predict(path)
        with Image.open(path) as image:
            assert_equal(detector.predict(image), expected)
        assert_equal(detector.predict(str(path)), expected)
    with Image.open(pictures[0]) as image:
        assert_equal(detector.predict(np.asarray(image)), detector.predict(pictures[0]))


def test_many_pictures_are_found_like_one(detector, pictures):
    with Image.open(pictures[2]) as image:
        given = [str(pictures[0]), pictures[1], image]
        found, together = (detector.predict(given, batch=batch) for batch in (1, 2))
    assert [f.path for f in found] == [pictures[0], pictures[1], None]
    for one, other, path in zip(found, together, pictures, strict=True):
        assert_equal(one, detector.predict(path))
        np.testing.assert_allclose(other.scores, one.scores, atol=1e-5)
    assert detector.predict([]) == []


def test_lists_are_computed_as_detect_does_and_single_pictures_by_all_cores(weights, pictures, monkeypatch):
    lanes: list[int] = []
    predict = Predictor.predict

    def watched(self, images):
        lanes.append(self._lanes.count)
        return predict(self, images)

    monkeypatch.setattr(Predictor, "predict", watched)
    monkeypatch.setattr("refinedet_cli.engine.predict.lanes_for", lambda device: 2)
    detector = Detector.load(weights, device="cpu")
    for given in (pictures[0], pictures[:1], pictures, pictures):
        detector.predict(given)
    detector.predict(pictures, batch=2)
    assert lanes == [1, 1, 2, 2, 2, 1]


def test_what_is_no_picture_is_refused(detector, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        detector.predict(tmp_path / "none.jpg")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (np.zeros((4, 4, 4), np.uint8), r"an array uint8\[4, 4, 4\] is no picture"),
        (np.zeros((4, 4, 3), np.float32), r"an array float32\[4, 4, 3\] is no picture"),
        (np.zeros((0, 4, 3), np.uint8), r"an array uint8\[0, 4, 3\] is no picture"),
        (None, "NoneType is no picture"),
        (3, "int is no picture"),
        ([np.zeros((4, 4, 3), np.uint8), 3.5], "float is no picture"),
    ],
)
def test_wrong_types_are_refused(detector, given, says):
    with pytest.raises(DataError, match=says) as caught:
        detector.predict(given)
    assert isinstance(caught.value, ValueError)
    assert "uint8[H, W, 3]" in (caught.value.hint or "")


def test_no_objects_are_said(detector):
    assert str(detector.predict(np.zeros((8, 8, 3), np.uint8), score=1.0)) == "no objects"


def test_grey_and_transparent_pillow_images_are_read_like_files(detector, tmp_path):
    path = tmp_path / "p.png"
    for mode in ("L", "RGBA", "I;16"):
        array = np.random.default_rng(1).integers(0, 256, (40, 40, 4) if mode == "RGBA" else (40, 40))
        image = Image.fromarray(array.astype(np.uint16 if mode == "I;16" else np.uint8))
        image.save(path)
        assert_equal(detector.predict(image), detector.predict(path))


@pytest.mark.parametrize("where", ["file", "hub"])
def test_the_command_finds_the_same(hub, run, weights, pictures, tmp_path, where):
    hub.put("acme/signs", {"model.safetensors": weights.read_bytes()})
    name = str(weights) if where == "file" else "acme/signs"
    detector = Detector.load(name) if where == "file" else Detector.from_pretrained(name)
    options = ("--weights", name, "--score", SCORE)
    assert run("detect", pictures[0].parent, *options, "--out", tmp_path / "found").code == 0
    document = json.loads((tmp_path / "found" / "detections.json").read_text())
    keys = ("image_id", "category_id", "bbox", "score")
    written = [{key: entry[key] for key in keys} for entry in document["annotations"]]
    ids = {image["file_name"]: image["id"] for image in document["images"]}
    found = detector.predict(pictures, score=SCORE)
    assert written == [entry for f, path in zip(found, pictures, strict=True) for entry in f.to_coco(ids[path.name])]
    assert {entry["category_id"] for entry in written} == {30, 7}


def test_a_revision_of_the_hub(hub, weights):
    hub.put("acme/signs", {"model.safetensors": weights.read_bytes()}, "v1")
    assert Detector.from_pretrained("acme/signs", revision="v1").classes == CLASSES.names
    with pytest.raises(CheckpointError, match="no such revision"):
        Detector.from_pretrained("acme/signs", revision="v2")
    with pytest.raises(CheckpointError, match="--offline forbids the network"):
        Detector.from_pretrained("acme/other", offline=True)
    with pytest.raises(UsageError, match="names nothing on the Hub"):
        Detector.from_pretrained("refinedet320_mobilenetv2", revision="v1")


def test_a_detector_is_published_and_loaded_again(hub, detector, weights, pictures, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    hub.tokens["hf_writer"] = "acme"
    done = detector.push_to_hub("acme/signs", licence="mit", private=True)
    assert hub.repos["acme/signs"].private
    again = Detector.from_pretrained("acme/signs", revision=done.commit)
    assert file_sha256(again.path) == file_sha256(weights)
    assert_equal(again.predict(pictures[0]), detector.predict(pictures[0]))


class _Detections(SimpleNamespace):
    """Takes what supervision's class of this name takes."""

    def __init__(self, *, xyxy, confidence, class_id, data):
        super().__init__(xyxy=xyxy, confidence=confidence, class_id=class_id, data=data)


def test_supervision_gets_its_own_kind(detector, pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=_Detections))
    found = detector.predict(pictures[0])
    given = found.to_supervision()
    assert given.xyxy is found.boxes
    assert given.confidence is found.scores
    assert given.class_id is found.labels
    assert given.data["class_name"].tolist() == list(found.names)


def test_without_supervision_it_says_so(detector, pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UsageError, match="supervision cannot be imported") as caught:
        detector.predict(pictures[0]).to_supervision()
    assert caught.value.hint == "pip install supervision"


def test_training_writes_what_the_command_writes(tmp_path, pictures, caplog):
    image = {"id": 1, "file_name": pictures[0].name, "width": 80, "height": 48}
    box = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [5, 5, 40, 30], "area": 1200, "iscrowd": 0}
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"images": [image], "annotations": [box], "categories": [{"id": 3, "name": "stop"}]}))
    seen = []
    settings = {"train.epochs": 1, "train.batch": 1, "preprocess.height": 64, "preprocess.width": 64}
    with caplog.at_level("INFO", logger="refinedet_cli.api"):
        result = api.train(
            data,
            tmp_path / "run",
            images=pictures[0].parent,
            val="none",
            weights="none",
            preset="tiny",
            settings=settings,
            workers=0,
            device="cpu",
            on_progress=seen.append,
        )
    assert (result.finished, result.steps) == (True, 1)
    assert seen
    assert any(record.message.startswith("train: ") for record in caplog.records)
    config, provenance = read_header(tmp_path / "run" / "last.safetensors")
    assert (config.classes.names, provenance["train"]["epochs"]) == (("stop",), 1)
    assert Detector.load(tmp_path / "run").classes == ("stop",)


def _defaults(function):
    empty = inspect.Parameter.empty
    return {n: p.default for n, p in inspect.signature(function).parameters.items() if p.default is not empty}


@pytest.mark.parametrize(
    ("ours", "command"), [(Detector.load, detect), (Detector.predict, detect), (api.train, train_command)]
)
def test_defaults_are_those_of_the_command(ours, command):
    theirs = _defaults(command)
    shared = {name: default for name, default in _defaults(ours).items() if name in theirs}
    assert len(shared) >= 2
    assert shared == {name: theirs[name] for name in shared}
