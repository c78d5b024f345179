"""The options --tile and --tile-overlap, from the command line to the files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import tiny


@pytest.fixture(scope="module")
def weights(tmp_path_factory, save_random):
    config = tiny(Classes(names=("person", "cat"), category_ids=(1, 17))).detector
    return save_random(tmp_path_factory.mktemp("weights") / "tiny.safetensors", config)


@pytest.fixture
def data(tmp_path):
    """A data set of one large and one small picture."""
    generator = np.random.default_rng(0)
    for name, (height, width) in (("large.png", (100, 150)), ("small.png", (50, 40))):
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / name)
    document = {
        "images": [
            {"id": 1, "file_name": "large.png", "width": 150, "height": 100},
            {"id": 2, "file_name": "small.png", "width": 40, "height": 50},
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 17, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 30], "area": 600, "iscrowd": 0}
        ],
    }
    (tmp_path / "data.json").write_text(json.dumps(document))
    return tmp_path


NOTE = "tiles of 64 px that overlap by 6 px, and the whole picture: 8 looks at 2 pictures, 4 times the cost; 1 of the"


def test_detect_tells_and_records_the_tiles(run, data, weights):
    options = ("--weights", weights, "--score", "0", "--tile", "64", "--tile-overlap", "0.1", "--no-draw")
    code, _, stderr = run("detect", data / "large.png", data / "small.png", "--out", data / "out", *options)
    assert code == 0
    assert NOTE in " ".join(stderr.split())
    written = json.loads((data / "out" / "detections.json").read_text())
    assert written["info"]["tiles"] == {"size": 64, "overlap": 0.1, "whole": True}
    found = [sum(a["image_id"] == image["id"] for a in written["annotations"]) for image in written["images"]]
    assert found[0] > found[1] > 0
    assert all(a["bbox"][0] + a["bbox"][2] <= 150.001 for a in written["annotations"])


def test_eval_detects_the_same_as_detect(run, data, weights):
    options = ("--weights", weights, "--tile", "64", "--tile-overlap", "0.1")
    shown = run("eval", "--dataset", data / "data.json", *options).stdout
    assert "64 px that overlap by 6 px, and the whole picture" in next(n for n in shown.splitlines() if "Tiles" in n)
    code, stdout, stderr = run("eval", "--dataset", data / "data.json", "--out", data / "eval", "--json", *options)
    assert code == 0
    assert NOTE in " ".join(stderr.split())
    assert json.loads(stdout)["origin"]["tiles"]["size"] == 64
    assert json.loads((data / "eval" / "metrics.json").read_text())["origin"]["tiles"]["size"] == 64
    saved = run("eval", "--dataset", data / "data.json", "--from", data / "eval" / "detections.json").stdout
    assert ["Tiles", "64", "px"] in [line.split() for line in saved.splitlines()]
    options = (*options, "--precision", "fp32")
    assert run("detect", data / "large.png", "--score", "0", "--out", data / "out", "--no-draw", *options).code == 0
    boxes = [
        sorted(
            (a["score"], *a["bbox"])
            for a in json.loads((data / folder / "detections.json").read_text())["annotations"]
            if a["image_id"] == 1
        )
        for folder in ("eval", "out")
    ]
    assert len(boxes[0]) > 10
    np.testing.assert_allclose(boxes[0], boxes[1], atol=1e-3)


def test_tiles_that_change_nothing_are_remarked_on(run, data, weights):
    finished = run("detect", data / "small.png", "--weights", weights, "--tile", "640")
    assert finished.code == 0
    assert "--tile 640 changes nothing" in " ".join(finished.stderr.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tile-overlap", "0.3"), "--tile-overlap"),
        (("--tile", "31"), "--tile"),
        (("--tile", "64", "--tile-overlap", "0.6"), "--tile-overlap"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(run, data, weights, options, said):
    for command in (("detect", data / "small.png"), ("eval", "--dataset", data / "data.json")):
        finished = run(*command, "--weights", weights, *options)
        assert finished.code == 2
        assert said in finished.stderr


def test_saved_detections_need_no_tiles(run, data):
    finished = run("eval", "--dataset", data / "data.json", "--from", data / "data.json", "--tile", "64")
    assert finished.code == 2
    assert "--tile does not go with --from" in finished.stderr
