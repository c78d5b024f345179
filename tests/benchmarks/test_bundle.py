"""Bundling: half precision, a manifest that reads back, and the preset's post-processing of today."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import tiny
from refinedet_cli.zoo.checkpoint import file_sha256, load_detector, save_checkpoint

CLASSES = Classes(names=("cat", "potted plant"), category_ids=(1, 2))


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("benchmarks/bundle.py")


def test_a_checkpoint_becomes_a_bundled_file_with_its_entry(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "WEIGHTS", tmp_path)
    torch.manual_seed(0)
    config = tiny(CLASSES).detector
    odd = replace(config, postprocess=replace(config.postprocess, candidates=7))
    provenance = {"data": {"name": "d", "sha256": "e"}, "pictures_seen": 9, "seed": 3, "start": {"random": True}}
    save_checkpoint(tmp_path / "run.safetensors", odd, build(config).network.state_dict(), provenance)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    truth = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 64}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 2, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "potted plant"}],
    }
    (tmp_path / "val.json").write_text(json.dumps(truth))
    folder = tmp_path / "weights"
    folder.mkdir()
    entry = {"recipe": 'refinedet train "x"\nrefinedet train y', "cost": "é"}
    path, evaluation = script.bundle(tmp_path / "run.safetensors", str(tmp_path / "val.json"), folder, entry)
    assert path == folder / "tiny.safetensors"
    assert load_detector(path).config.postprocess == config.postprocess
    described = tomllib.loads((folder / "manifest.toml").read_text(encoding="utf-8"))["tiny"]
    assert described["sha256"] == file_sha256(path)
    assert described["recipe"] == entry["recipe"]
    assert described["cost"] == "é"
    assert described["AP50"] == round(evaluation.result.AP50, 4)
    assert list(described["AP50_of_class"]) == ["potted plant"]


def test_other_entries_of_the_manifest_stay(script):
    text = "\n".join(script._table(n, {"file": n, "AP50_of_class": {"a b": 0.5, "c": None}}) for n in ("x", "y"))
    read = {"file": "x", "AP50_of_class": {"a b": 0.5}}
    assert tomllib.loads(text) == {"x": read, "y": {**read, "file": "y"}}
