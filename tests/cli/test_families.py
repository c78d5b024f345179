"""What the commands do alike with detectors of the families that came later."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize(
    ("family", "how"),
    [
        pytest.param("ssd", (), id="ssd"),
        pytest.param("ssd", ("--tile", 64), id="ssd, tiles"),
        pytest.param("ssd", ("--multi-scale", "voc"), id="ssd, multi-scale"),
        pytest.param("yolo", (), id="yolo"),
        pytest.param("yolo", ("--tile", 64), id="yolo, tiles"),
        pytest.param("yolo", ("--multi-scale", "coco"), id="yolo, multi-scale"),
    ],
)
def test_detect(run, small_weights, photos, tmp_path, family, how):
    weights = small_weights(family)
    ended = run("detect", photos, "--weights", weights, "--out", tmp_path, "--score", "0.05", *how, "--json")
    assert ended.document()
    entries = json.loads((tmp_path / "detections.json").read_text())["annotations"]
    assert len(entries) > 3
    assert {e["category_id"] for e in entries} <= {1, 17, 18}


@pytest.mark.parametrize(
    ("family", "kind"),
    [("ssd", "onnx"), ("ssd", "openvino"), ("yolo", "onnx"), pytest.param("yolo", "openvino", marks=pytest.mark.slow)],
)
def test_export_is_proven_and_detects(run, small_weights, photos, tmp_path, family, kind):
    pytest.importorskip(kind)
    given = ("--weights", small_weights(family), "--format", kind, "--out", tmp_path, "--verify", photos)
    assert run("export", *given, "--json").document()
    file = next(tmp_path.glob("*.onnx" if kind == "onnx" else "*.xml"))
    found = run("detect", photos, "--weights", file, "--out", tmp_path / "found", "--score", "0.05", "--json")
    assert found.document()
    assert len(json.loads((tmp_path / "found" / "detections.json").read_text())["annotations"]) > 3
