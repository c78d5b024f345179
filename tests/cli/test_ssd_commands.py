"""Every command on a detector that moves its anchors once."""

from __future__ import annotations

from pathlib import Path

import pytest

from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import ssd300_vgg16, tiny
from refinedet_cli.zoo.checkpoint import load_detector

CLASSES = Classes(names=("person", "cat", "dog"), category_ids=(1, 17, 18))


@pytest.fixture(scope="module")
def weights(small_weights) -> Path:
    return small_weights("ssd")


@pytest.fixture(scope="module")
def data(label_photos) -> Path:
    """The photographs as a COCO data set."""
    boxes = ((1, [2, 3, 20, 30]), (1, [40, 5, 16, 24]), (2, [10, 10, 25, 20]), (3, [5, 30, 60, 50]))
    return label_photos("ssd.json", boxes)


def test_eval_tells_what_moving_the_anchors_buys(run, weights, data, tmp_path):
    page = tmp_path / "report.html"
    ended = run("eval", "--dataset", data, "--weights", weights, "--report", page, "--json")
    assert ended.document()["metrics"]["AP"] is not None
    text = page.read_text()
    assert "What moving the anchors buys" in text
    assert "after the head" in text
    assert "ARM" not in text


def test_anchors_are_measured_before_and_after_the_head(run, weights, data, tmp_path):
    ended = run("anchors", "--dataset", data, "--weights", weights, "--no-search", "--visualize", "--out", tmp_path)
    assert ended.code == 0, ended.stderr
    assert "Anchors moved, on 3 pictures with 4 objects" in " ".join(ended.stdout.split())
    assert "What moving the anchors buys" in (tmp_path / "anchors.html").read_text()


def test_the_bare_network_is_exported_with_the_names_of_its_family(run, weights, photos, tmp_path):
    onnx = pytest.importorskip("onnx")
    shared = ("--weights", weights, "--format", "onnx", "--raw", "--verify", photos, "--json")
    run("export", *shared, "--out", tmp_path).document()
    graph = onnx.load(next(tmp_path.glob("*.onnx"))).graph
    assert [output.name for output in graph.output] == ["logits", "offsets"]


def test_weights_info_and_data_check(run, weights, data):
    assert "ssd, backbone mobilenet_v2" in run("weights", "info", weights).stdout
    assert run("data", "check", data, "--weights", weights, "--json").document()["reach"]["objects"] == 4


SMALL = (
    "--preset", "ssd320_mobilenetv2", "--set", "preprocess.height=64", "--set", "preprocess.width=64",
    "--batch", 2, "--epochs", 1, "--workers", 0,
)  # fmt: skip


def test_train_from_another_family_and_go_on_from_it(run, data, tmp_path, save_random):
    other = save_random(tmp_path / "refinedet.safetensors", tiny(CLASSES).detector)
    common = ("train", "--data", data, "--val", data, "--json", *SMALL)
    ended = run(*common, "--weights", other, "--out", tmp_path / "first")
    assert ended.document()["finished"]
    assert "refinedet.safetensors: backbone kept; head new" in ended.stderr
    header, *rows = (tmp_path / "first" / "log.csv").read_text().splitlines()
    assert rows
    assert {"conf", "loc", "positives_head"} <= set(header.split(","))
    kept = tmp_path / "first" / "last.safetensors"
    assert load_detector(kept).config.family == "ssd"
    again = run(*common, "--weights", kept, "--out", tmp_path / "second")
    assert again.document()["finished"]
    assert "all class outputs" in again.stderr or "backbone, head kept" in again.stderr


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("network.arm=true", "network.arm must be false: an SSD has none"),
        ("preprocess.height=100", "preprocess.height must be a positive multiple of 64, not 100"),
    ],
)
def test_settings_that_do_not_fit(run, data, tmp_path, setting, message):
    ended = run("train", "--data", data, "--val", data, "--out", tmp_path / "run", *SMALL, "--set", setting)
    assert ended.code == 3
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_ssd300_takes_no_other_sizes(run, data, tmp_path, save_random):
    path = save_random(tmp_path / "ssd300.safetensors", ssd300_vgg16(CLASSES).detector)
    ended = run("eval", "--dataset", data, "--weights", path, "--multi-scale", "voc")
    assert ended.code == 3
    assert "multi-scale voc: a pass at" in ended.stderr
    assert "leave --multi-scale out" in ended.stderr
    shared = ("--preset", "ssd300_vgg16", "--weights", "none", "--out", tmp_path / "run")
    ended = run("train", "--data", data, "--val", data, *shared, "--set", "train.small_input=[[0.5, 0.6]]")
    assert ended.code == 3
    assert "train.small_input: preprocess.height 192 and anchors.strides" in ended.stderr
