"""Every command on a detector without anchors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes, to_dict
from refinedet_cli.core.presets import tiny
from refinedet_cli.zoo.checkpoint import load_detector, save_checkpoint
from refinedet_cli.zoo.warm_start import copy_detector

OTHERS = Classes(names=("dog", "bird"), category_ids=(2, 3))


@pytest.fixture(scope="module")
def weights(small_weights) -> Path:
    return small_weights("yolo")


@pytest.fixture(scope="module")
def data(label_photos) -> Path:
    """The photographs as a COCO data set; two boxes of the first share a cell of the grid."""
    boxes = ((1, [2, 3, 20, 30]), (1, [4, 5, 16, 24]), (2, [10, 10, 25, 20]), (3, [5, 30, 30, 8]))
    return label_photos("yolo.json", boxes)


def test_eval_and_its_report(run, weights, data, tmp_path):
    page = tmp_path / "report.html"
    ended = run("eval", "--dataset", data, "--weights", weights, "--report", page, "--json")
    assert ended.document()["metrics"]["AP"] is not None
    assert page.stat().st_size > 10_000


def test_weights_info_tells_the_grid(run, weights, small_config):
    config = run("weights", "info", weights, "--json").document()["config"]
    assert config == json.loads(json.dumps(to_dict(small_config("yolo"))))
    ended = run("weights", "info", weights)
    assert "yolo, backbone mobilenet_v2" in ended.stdout
    assert "4 x 4 cells of 32 px, 2 boxes each" in ended.stdout


def test_data_check_counts_the_objects_that_share_a_cell(run, weights, data, tmp_path):
    ended = run("data", "check", data, "--weights", weights, "--out", tmp_path, "--json")
    found = ended.document()
    assert found["reach"] is None
    assert found["cells"] == {
        "preset": "yolo320_mobilenetv2",
        "input_size": {"height": 128, "width": 128},
        "grid": {"rows": 4, "columns": 4},
        "objects": 4,
        "left_out": 1,
    }
    (finding,) = (f for f in json.loads((tmp_path / "findings.json").read_text())["findings"] if "cell" in f["kind"])
    assert "(id 2)" in finding["where"]
    shown = " ".join(run("data", "check", data, "--weights", weights).stdout.split())
    assert "1 of 4 boxes (25.0 %) with the centre in the cell of a larger one, of the 4 x 4 cells of" in shown


def test_data_check_of_a_detector_with_anchors_has_no_cells(run, data):
    found = run("data", "check", data, "--preset", "tiny", "--json").document()
    assert found["cells"] is None
    assert found["reach"]["objects"] == 4


@pytest.mark.parametrize("which", ["weights", "preset"])
def test_anchors_says_that_there_are_none(run, weights, data, which):
    named = ("--weights", weights) if which == "weights" else ("--preset", "yolo320_mobilenetv2")
    ended = run("anchors", "--dataset", data, *named)
    assert ended.code == 2
    assert "yolo320_mobilenetv2 has no anchors: a YOLO predicts boxes from the cells of a grid" in ended.stderr
    assert "data check" in ended.stderr
    assert "Traceback" not in ended.stderr


SMALL = (
    "--preset", "yolo320_mobilenetv2", "--set", "preprocess.height=64", "--set", "preprocess.width=64",
    "--set", "grid.channels=32", "--set", "grid.layers=1", "--batch", 2, "--epochs", 1, "--workers", 0,
)  # fmt: skip


def test_train_and_go_on_from_it(run, data, tmp_path):
    common = ("train", "--data", data, "--val", data, "--json", *SMALL)
    ended = run(*common, "--weights", "none", "--out", tmp_path / "first")
    assert ended.document()["finished"]
    assert "1 of 4 boxes (25.0 %) with the centre in the cell of a larger one" in ended.stderr
    header, *rows = (tmp_path / "first" / "log.csv").read_text().splitlines()
    assert rows
    assert {"box", "object", "no_object", "class", "positives_objects", "positives_left_out"} <= set(header.split(","))
    kept = tmp_path / "first" / "last.safetensors"
    trained = load_detector(kept)
    assert trained.config.family == "yolo"
    assert trained.config.grid.stride == 32
    again = run(*common, "--weights", kept, "--out", tmp_path / "second")
    assert again.document()["finished"]


def test_settings_of_another_family_do_not_apply(run, data, tmp_path):
    for given, message in (
        (("--preset", "yolo320_mobilenetv2", "--set", "anchors.variances=[1,1]"), "a yolo has no anchors"),
        (("--preset", "tiny", "--set", "grid.stride=64"), "a refinedet has no grid"),
        (
            ("--preset", "yolo320_mobilenetv2", "--set", "loss.neg_ratio=2"),
            "loss.neg_ratio is of detectors with anchors",
        ),
    ):
        ended = run("train", "--data", data, "--val", "none", "--out", tmp_path / "run", "--weights", "none", *given)
        assert ended.code == 3
        assert message in ended.stderr
        assert "Traceback" not in ended.stderr
    ended = run("train", "--data", data, "--out", tmp_path / "run", *SMALL, "--set", "nonsense=1")
    assert "known here: grid, loss, network" in ended.stderr


def test_weights_of_another_family_give_their_backbone(run, data, tmp_path):
    kept = tmp_path / "tiny.safetensors"
    config = tiny(OTHERS).detector
    save_checkpoint(kept, config, build(config).network.state_dict(), {})
    ended = run(
        "train", "--data", data, "--val", "none", "--out", tmp_path / "run", *SMALL, "--weights", kept, "--json"
    )
    assert ended.document()["finished"]
    assert "backbone" in ended.stderr


def test_outputs_of_shared_classes_are_taken_over(small_config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        old, new = build(small_config("yolo")), build(small_config("yolo", OTHERS))
    fresh = new.network.classes.weight[1].clone()
    taken = copy_detector(new, old, {1: 3})
    assert "classes.weight" in taken.remapped
    assert "boxes.weight" in taken.copied
    assert torch.equal(new.network.classes.weight[0], old.network.classes.weight[2])
    assert torch.equal(new.network.classes.weight[1], fresh)
    assert torch.equal(new.network.boxes.weight, old.network.boxes.weight)
