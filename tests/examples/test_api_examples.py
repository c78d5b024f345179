"""The examples in Python do what they say."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def example(root, monkeypatch, capsys):
    """Run an example in this process, where torch is loaded already, and return what it prints."""

    def call(name: str, *args: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        runpy.run_path(str(root / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)).save(path)
    return path


def test_predict_prints_what_it_finds(example, picture):
    printed = example("predict.py", picture, picture)
    assert printed.count(f"{picture}: ") == 2


def test_train_trains_and_uses_the_result(example, picture, tmp_path):
    image = {"id": 1, "file_name": picture.name, "width": 80, "height": 48}
    box = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [5, 5, 40, 30], "area": 1200, "iscrowd": 0}
    document = {"images": [image], "annotations": [box], "categories": [{"id": 3, "name": "stop"}]}
    for part in ("train", "val"):
        (tmp_path / f"{part}.json").write_text(json.dumps(document))
    settings = ("train.epochs=1", "train.batch=1", "preprocess.height=64", "preprocess.width=64")
    printed = example("train.py", tmp_path, tmp_path / "run", *settings)
    assert printed.startswith("1 steps, best AP on the validation data: ")
    assert printed.endswith("it finds: stop\n")


@pytest.mark.parametrize("name", ["train.py", "predict.py", "run_onnx.py"])
def test_it_says_how_it_is_called(example, name):
    if name == "run_onnx.py":
        pytest.importorskip("onnxruntime")
    with pytest.raises(SystemExit, match=f"usage: python examples/{name} "):
        example(name)
